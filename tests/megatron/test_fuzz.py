"""Command lines at random: each trains a step, or is refused in one line before Megatron sets anything up."""

import math
import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.long

EXAMPLES = 60
FLAGS = {
    # name: values; None leaves the flag out, "" gives it without a value
    "moe-router-type": ["air", "air", "air", "product_key", "hierarchical", "hash", "vq", "topk"],
    "moe-granular-experts": ["", "", None],
    "moe-dispatch": ["compact", "compact", "stock", None],
    "moe-router-input-norm": [None, "running", "none", "low_rank_whitening"],
    "num-experts": [16, 16, 64, 60, 2, 1],
    "moe-router-topk": [2, 2, 4, 1, 16, 17],
    "moe-ffn-hidden-size": [8, 1, None],
    "num-layers": [2, 2, 4, 3],
    "moe-router-load-balancing-type": [
        "aux_loss", "none", "seq_aux_loss", "global_aux_loss", "sinkhorn", "quantile_balancing",
    ],
    "moe-aux-loss-coeff": [0, 0.01, 0.01, -1, "nan"],
    "moe-z-loss-coeff": [None, None, 0.001, "inf"],
    "moe-router-score-function": [None, "softmax", "sigmoid", "sqrtsoftplus"],
    "moe-router-enable-expert-bias": [None, None, ""],
    "moe-router-pre-softmax": [None, None, ""],
    "moe-router-topk-scaling-factor": [None, 4.0, 0],
    "moe-router-dtype": ["fp32", "fp32", "fp64", None],
    "moe-input-jitter-eps": [None, None, 0.01],
    "moe-shared-expert-intermediate-size": [None, None, 16],
    "moe-layer-freq": [None, None, 2, "[0,1]", "[1,0]*1"],
    "moe-expert-capacity-factor": [None, None, None, 1.0],
    "moe-token-dispatcher-type": ["alltoall", "allgather", "flex"],
    "moe-air-num-clusters": [None, None, 4, 16, 0, -1, 1000],
    "moe-air-shortlist-size": [None, None, 8, 16, 1, 100],
    "moe-air-num-probes": [None, None, 1, 2, 4, 64],
    "moe-air-num-candidates": [None, None, 4, 8, 1],
    "moe-air-num-explored": [None, 4, 8, -1],
    "moe-air-shortlist-source": [None, None, "tokens", "experts"],
    "moe-air-refresh-interval": [None, 1, 3, -1],
    "moe-air-diagnostics-interval": [None, 1, 0, -5],
    "moe-product-key-heads": [None, None, 1, 2, 3],
    "moe-product-key-on-tokens": [None, None, ""],
    "moe-hierarchical-topk-groups": [None, None, 2, 100],
    "moe-num-hash-layers": [None, None, 1, 1, 3, -1],
    "moe-hash-balance": [None, None, "frequency"],
    "expert-model-parallel-size": [None, 2, 2, 3],
    "tensor-model-parallel-size": [None, None, None, 2],
    "sequence-parallel": [None, None, ""],
    "expert-tensor-parallel-size": [None, None, 1],
    "pipeline-model-parallel-size": [None, None, None, 2],
    "mtp-num-layers": [None, None, None, 1],
    "bf16": [None, None, ""],
    "fp16": [None, None, None, ""],
    "use-distributed-optimizer": [None, None, ""],
    "overlap-grad-reduce": [None, None, ""],
    "recompute-granularity": [None, None, "selective", "full"],
    "recompute-method": [None, "uniform", "block"],
    "recompute-num-layers": [None, 1],
    "recompute-modules": [None, None, "moe", "moe_act"],
    "calculate-per-token-loss": [None, None, ""],
    "micro-batch-size": [2, 2, 1, 8, 3],
    "lr": ["1e-2", "1e-2", "nan"],
    # Megatron's own features around ours.
    "optimizer": [None, "sgd", "muon", "lion", "soap", "dist_muon"],
    "use-mup": [None, ""],
    "decoupled-lr": [None, "1e-3"],
    "step-batch-size-schedule": [None, "0:4,16:8"],
    "qk-layernorm": [None, ""],
    "normalization": [None, "LayerNorm", "RMSNorm"],
    "swiglu": [None, ""],
    "squared-relu": [None, ""],
    "attention-output-gate": [None, ""],
    "softmax-type": [None, "learnable"],
    "window-size": [None, "4,0"],
    "log-params-norm": [None, ""],
    "log-num-zeros-in-grad": [None, ""],
    "ckpt-format": [None, "torch", "torch_dist"],
    "eod-mask-loss": [None, ""],
    "reset-attention-mask": [None, ""],
    "dataloader-type": [None, "single", "cyclic"],
    "rerun-mode": [None, "disabled", "validate_results"],
    "clip-grad": [None, 0, 1.0],
    "ddp-average-in-collective": [None, ""],
    "multiple-validation-sets": [None, ""],
    "full-validation": [None, ""],
}  # fmt: skip
COMMON = ["--attention-dropout", "0", "--hidden-dropout", "0", "--train-iters", "1", "--initial-loss-scale", "4096"]
_REFUSED = re.compile(r"^air_moe_megatron\.pretrain: error[^:]*: (.+)$", re.MULTILINE)
_LOSS = re.compile(r"iteration +1/ +1 .*?lm loss: ([^ ]+) ")


@st.composite
def command_lines(draw) -> list[str]:
    """A working command line of AIR with up to six flags changed to anything in the table."""
    chosen = {name: values[0] for name, values in FLAGS.items()}
    for name in draw(st.lists(st.sampled_from(list(FLAGS)), min_size=1, max_size=6, unique=True)):
        chosen[name] = draw(st.sampled_from(FLAGS[name]))
    given = {name: value for name, value in chosen.items() if value is not None}
    return [word for name, value in given.items() for word in (f"--{name}", *([] if value == "" else [str(value)]))]


def test_a_command_line_trains_a_step_or_is_refused_in_one_line(pretrain):
    @settings(
        max_examples=EXAMPLES, deadline=None, derandomize=True, database=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(flags=command_lines())
    def check(flags):
        run = pretrain(*COMMON, *flags, succeeds=False)
        seen = f"{' '.join(flags)}\n{run.output[-3000:]}"
        if run.returncode == 0:
            (loss,) = _LOSS.findall(run.output) or [None]
            assert loss is not None and math.isfinite(float(loss)), seen
        else:
            refusals = _REFUSED.findall(run.output)
            # Without a launcher that ends the others, each rank may say it.
            assert len(set(refusals)) == 1 and "Traceback" not in run.output, seen
            assert "time to initialize megatron" not in run.output, seen

    check()
