"""The table of the scaling example, from TensorBoard folders that are written here."""

import importlib.util
import math
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples/ep_scaling.py"
ARGUMENTS = {
    **{name: 1 for name in ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size")},
    **{"world_size": 2, "expert_model_parallel_size": 2, "num_layers": 2, "log_interval": 10, "seq_length": 32},
    **{"micro_batch_size": 2, "global_batch_size": 4, "num_experts": 256, "moe_router_topk": 4, "hidden_size": 16},
    **{"moe_ffn_hidden_size": 2, "moe_router_type": "air", "moe_num_hash_layers": 0, "params_dtype": "torch.bfloat16"},
    **{"distributed_backend": "gloo", "swiglu": False, "accumulate_allreduce_grads_in_fp32": True},
    **{f"moe_air_{name}": 0 for name in ("num_clusters", "shortlist_size", "num_probes", "num_candidates")},
    **{"moe_air_list_parts": 1, "moe_air_num_explored": 0, "moe_air_refresh_interval": 20},
    **{"moe_layer_freq": 1, "recompute_granularity": None, "recompute_modules": ["core_attn"]},
    **{"moe_router_input_norm": "running", "moe_air_codebook_source": "tokens"},
    **{"moe_air_shard_experts": False, "use_distributed_optimizer": False},
}


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("ep_scaling", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write(folder, **arguments):
    """A run of twenty steps, whose last one was measured layer by layer."""
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder)) as writer:
        for name, value in {**ARGUMENTS, **arguments}.items():
            writer.add_text(name, str(value))
        figures = {"imbalance-factor": 2.0, "rank-imbalance": 1.1}
        figures |= {"dispatch-bytes-per-token": 60.0, "remote-bytes-per-token": 40.0}
        for iteration in (10, 20):
            writer.add_scalar("iteration-time", 0.5, iteration)
            for name, value in figures.items():
                writer.add_scalar(f"air/{name}", value, iteration)
        for layer in (1, 2):
            writer.add_scalar(f"air/layer_{layer}/imbalance-factor", 50.0, 20)
            writer.add_scalar(f"air/layer_{layer}/rank-imbalance", 1.9, 20)
    return folder


def test_loads_are_those_of_all_layers_and_not_of_the_last_one(example, tmp_path):
    _, row, _ = example.read_run(write(tmp_path), 0, 300.0)
    assert (row.imbalance_factor, row.most_loaded_rank) == pytest.approx((2.0, 1.1))
    assert (row.dispatched_bytes_per_token, row.remote_bytes_per_token, row.steps) == (60.0, 40.0, 20)


@pytest.mark.parametrize(
    ("warmup", "arguments", "message"),
    [
        (0, None, "Megatron's argument log_interval is not in it; did the run start?"),
        (11, {}, "no scalar iteration-time lies after the warm-up of 11 steps"),
        (0, {"params_dtype": "torch.int8"}, "params_dtype (torch.int8) must be one of torch.float32"),
    ],
    ids=["empty", "warmup", "dtype"],
)
def test_what_a_run_lacks_is_named_with_its_folder(example, tmp_path, warmup, arguments, message):
    if arguments is not None:
        write(tmp_path, **arguments)
    with pytest.raises(ValueError) as raised:
        example.read_run(tmp_path, warmup, 300.0)
    assert str(raised.value).startswith(f"{tmp_path}: {message}")


def test_steps_of_the_warmup_do_not_count(example, tmp_path):
    assert example.read_run(write(tmp_path), 10, 300.0)[1].steps == 10


def test_a_distributed_optimizer_is_planned_as_one(example, tmp_path):
    plain, distributed = (
        example.read_run(write(tmp_path / str(given), use_distributed_optimizer=given), 0, 300.0)[2].mb_per_step
        for given in (False, True)
    )
    # Over two ranks: an fp32 gradient all-reduced, or scattered with its bf16 weight gathered. No expert has a replica.
    assert plain - distributed == pytest.approx(2 * 256 * 16 * (2 * 4 - (4 + 2)) / 2 / 1e6)


def test_the_input_norm_of_the_runs_is_planned(example, tmp_path):
    sent = {
        norm: example.read_run(write(tmp_path / norm, moe_router_input_norm=norm), 0, 300.0)[2].mb_per_step
        for norm in ("none", "running", "whitening")
    }
    assert sent["none"] < sent["running"]
    assert sent["whitening"] - sent["none"] == pytest.approx(2 * 4 * (16 + 1) ** 2 / 1e6)  # layers, fp32 sums


def test_recomputed_forwards_are_planned(example, tmp_path):
    sent = [
        example.read_run(
            write(tmp_path / f"{place}", recompute_granularity=granularity, recompute_modules=modules), 0, 300.0
        )[2].mb_per_step
        for place, (granularity, modules) in enumerate(
            [(None, ["core_attn"]), ("selective", ["core_attn"]), ("selective", ["core_attn", "moe"]), ("full", None)]
        )
    ]
    assert sent[0] == sent[1] < sent[2] == sent[3]


@pytest.mark.parametrize("other", [{"moe_air_codebook_source": "experts"}, {"moe_layer_freq": [0, 1]}])
def test_what_the_plan_does_not_know_is_not_predicted(example, tmp_path, other):
    _, row, planned = example.read_run(write(tmp_path, **other), 0, 300.0)
    assert math.isnan(planned.mb_per_step) and math.isnan(row.planned_mb_per_step)
