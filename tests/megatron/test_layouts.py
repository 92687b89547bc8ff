"""Fifty steps in each layout against one rank on the same global batches: losses and gradient norms.

docs/layouts.md is the table of these layouts, and of those that cannot be tested here.
"""

import pytest

from tests.megatron.conftest import AIR, EP2, PRINTED_NORM, TP2, save_flags, trainer_of

pytestmark = pytest.mark.long

STEPS, SAVED = 50, 2
COMPACT = [
    *("--moe-granular-experts", "--moe-dispatch", "compact", "--num-layers", "4"),
    *("--attention-dropout", "0", "--hidden-dropout", "0", "--init-method-std", "0.1", "--train-iters", STEPS),
]
EP4 = ["--expert-model-parallel-size", "4"]
PP2 = ["--pipeline-model-parallel-size", "2"]
OPTIMIZER = ["--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather", "--ddp-bucket-size", "1"]
FULL_RECOMPUTE = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1".split()
MOE_RECOMPUTE = "--recompute-granularity selective --recompute-modules moe".split()
HYBRID = ["--hybrid-layer-pattern", "*E" * 4, "--spec", "tests.megatron.local_hybrid", "stack_spec"]

SHARED = {
    # name: flags of the run on one rank
    "fp32": [],
    "input norm": ["--moe-router-input-norm", "running"],
    "whitening": ["--moe-router-input-norm", "whitening"],
    "low-rank whitening": ["--moe-router-input-norm", "low_rank_whitening"],
    "stock dispatch": ["--moe-dispatch", "stock"],
    "bf16": ["--bf16"],
    "fp16": ["--fp16", "--initial-loss-scale", "4096"],
    # The auxiliary loss is over the tokens of a microbatch, in Megatron too.
    "no balancing loss": ["--moe-router-load-balancing-type", "none"],
    "loss per token": ["--calculate-per-token-loss"],
    "multi-token prediction": ["--mtp-num-layers", "1"],
    "shared expert": ["--moe-shared-expert-intermediate-size", "16"],
    "expert bias": "--moe-router-score-function sigmoid --moe-router-enable-expert-bias".split(),
    "loss over sequences": ["--moe-router-load-balancing-type", "seq_aux_loss"],
    "first layers by hash": ["--moe-num-hash-layers", "2"],
    "Muon": ["--optimizer", "muon", "--muon-fp32-matmul-prec", "high"],
    "Lion": ["--optimizer", "lion", "--lr", "1e-3"],
    "SGD": ["--optimizer", "sgd"],
    "loss over all ranks": ["--moe-router-load-balancing-type", "global_aux_loss"],
    "explored candidates": ["--moe-air-num-candidates", "4", "--moe-air-num-explored", "4"],
}
LAYOUTS = {
    # name: (ranks, flags beside those of one rank)
    "DP 2": (2, []),
    "EP 2": (2, EP2),
    "EP 4": (4, EP4),
    "EP 2, DP 2": (4, EP2),
    "TP 2, SP": (2, TP2),
    "TP 2, SP, EP 2": (2, [*TP2, *EP2]),
    "PP 2": (2, PP2),
    "PP 2, EP 2": (4, [*PP2, *EP2]),
    "PP 2, two virtual stages": (2, [*PP2, "--num-layers-per-virtual-pipeline-stage", "1"]),
    "distributed optimizer, overlap": (2, [*EP2, *OPTIMIZER]),
    "full recomputation": (1, FULL_RECOMPUTE),
    "recomputed MoE layers": (2, [*EP2, *MOE_RECOMPUTE]),
    "one microbatch": (1, ["--micro-batch-size", "8"]),  # instead of four
    "hybrid model": (2, [*EP2, *HYBRID]),
}
# Sharded routing: the reference has its lists in parts too, and replicated centers.
PARTS = ["--moe-air-list-parts", "4"]
OF_SHARDED = ("input norm", "whitening", "low-rank whitening", "bf16", "fp16", "loss per token",
              "multi-token prediction", "shared expert", "expert bias", "loss over sequences", "loss over all ranks",
              "explored candidates")  # fmt: skip
SHARED |= {f"{kind}, lists in parts": [*SHARED[kind], *PARTS] for kind in ("fp32", *OF_SHARDED)}
SHARDED_LAYOUTS = ("EP 2", "EP 4", "EP 2, DP 2", "TP 2, SP, EP 2", "PP 2, EP 2", "distributed optimizer, overlap",
                   "recomputed MoE layers", "hybrid model")  # fmt: skip
LAYOUTS |= {
    f"{layout}, sharded": (LAYOUTS[layout][0], [*LAYOUTS[layout][1], "--moe-air-shard-experts"])
    for layout in SHARDED_LAYOUTS
}
CASES = [
    *(("fp32, lists in parts", f"{layout}, sharded") for layout in SHARDED_LAYOUTS),
    *((f"{kind}, lists in parts", "EP 2, sharded") for kind in OF_SHARDED),
    *(("fp32", layout) for layout in LAYOUTS if layout != "one microbatch" and "sharded" not in layout),
    *((kind, "EP 2") for kind in SHARED if kind != "fp32" and "parts" not in kind),
    *((kind, "EP 2, DP 2") for kind in ("loss per token", "loss over sequences", "loss over all ranks", "expert bias")),
    *((kind, "EP 2, DP 2") for kind in ("Muon", "Lion", "SGD")),
    ("no balancing loss", "one microbatch"),
    ("first layers by hash", "PP 2"),
    *((kind, "EP 2, DP 2") for kind in ("input norm", "whitening", "low-rank whitening")),
    *(("explored candidates", layout) for layout in ("EP 2, DP 2", "TP 2, SP, EP 2", "recomputed MoE layers")),
]

LOSS = 1e-5  # relative: layouts sum in another order
# Rounded to 2^-9 or 2^-11, a token near the border between two experts may go to the other one, and the runs part.
HALF, HALF_STEPS = 0.05, 10
# In fp32 that happens too, after step 33 of these kinds: a token that has another codeword draws other candidates.
# Muon's iterations enlarge what rounding changes, after step 43.
# Owners whiten other numbers of rows at once than the ranks of the tokens do, and the products round otherwise.
COMPARED = {"loss over all ranks": 30, "explored candidates": 30, "Muon": 30}
COMPARED |= {f"{kind}, lists in parts": 15 for kind in ("whitening", "low-rank whitening")}
# Sharded routing adds up the gradients of tokens over the owners: the sums part by 2e-4 after step 20.
COMPARED_SHARDED = 20


@pytest.fixture(scope="module")
def train(pretrain, successors):
    """A function that trains the model of all layouts: flags -> Run."""
    return trainer_of(pretrain, *AIR, *COMPACT, *successors)


@pytest.fixture(scope="module")
def alone(train, tmp_path_factory):
    """A function that trains on one rank, once for each kind of model: the run, and its checkpoint of step SAVED."""
    runs = {}

    def run(kind, micro_batch):
        if (kind, micro_batch) not in runs:
            directory = tmp_path_factory.mktemp("alone")
            flags = [*SHARED[kind], "--micro-batch-size", micro_batch]
            train(*flags, *save_flags(directory, SAVED), "--exit-interval", SAVED, ranks=1)
            runs[kind, micro_batch] = train(*flags, ranks=1), directory
        return runs[kind, micro_batch]

    return run


@pytest.mark.parametrize(("kind", "layout"), CASES, ids=[f"{kind}-{layout}" for kind, layout in CASES])
def test_fifty_steps_equal_those_of_one_rank(train, alone, kind, layout):
    """Pipeline stages draw other first weights: they go on from the checkpoint of one rank."""
    ranks, flags = LAYOUTS[layout]
    # That loss sums the counts of a step's microbatches up to each, over all ranks: the same tokens for each of them.
    expected, directory = alone(kind, 2 * ranks if kind.startswith("loss over all ranks") else 2)
    start = SAVED if layout.startswith("PP") else 0
    run = train(*SHARED[kind], *flags, *(["--load", directory] if start else []), ranks=ranks)
    assert list(run.steps) == list(range(start + 1, STEPS + 1))
    # The second loss that a run prints is a mean of two.
    last = COMPARED.get(kind, COMPARED_SHARDED if "sharded" in layout else STEPS)
    steps = [step for step in range(start + 1, last + 1) if not start or step != start + 2]
    losses, norms = ({step: float(run.steps[step][index]) for step in steps} for index in range(2))
    for_loss, for_norms = ({step: float(expected.steps[step][index]) for step in steps} for index in range(2))
    if kind.startswith(("bf16", "fp16")):
        for step in steps[:HALF_STEPS]:
            assert losses[step] == pytest.approx(for_loss[step], rel=HALF)
            assert norms[step] == pytest.approx(for_norms[step], rel=2 * HALF)
    else:
        assert losses == pytest.approx(for_loss, rel=LOSS)
        assert norms == pytest.approx(for_norms, abs=PRINTED_NORM)
