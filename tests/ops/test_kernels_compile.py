"""Every kernel compiles for sm_90, fits its shared memory and multiplies 16-bit numbers on the tensor cores.

The interpreter, which runs kernels in tests without a GPU, knows nothing of this. Compiling needs no GPU: Triton brings
its own ptxas.
"""

import json
import os
import re
import sys
from pathlib import Path

import pytest

import air_moe_megatron
from tests.processes import run

pytestmark = pytest.mark.slow

SHARED_MEMORY = 227 * 1024  # bytes, the most that one block of threads gets on sm_90

# Kernels launched by each case of compile_kernels.py, with the operands of their tensor-core instructions. "plain" is a
# product without tensor cores, as of fp32 numbers; "" is no product.
BLOCKS = ("_segment_blocks_kernel", "")
ASSIGN = ("_assign_fwd_kernel", "bf16")
STATISTICS = {("_lengths_fwd_kernel", ""), ("_sorted_statistics_fwd_kernel", "")}
PAIR_SUMS, PAIR_WEIGHT = ("_pair_sums_fwd_kernel", ""), ("_pair_weight_bwd_kernel", "")
FINE_SCORES = {
    BLOCKS,
    ("_fine_scores_fwd_kernel", "bf16"),
    ("_fine_scores_bwd_hidden_kernel", "bf16"),
    ("_fine_scores_bwd_weight_kernel", "bf16"),
}
FINE_TOPK = ("_fine_topk_fwd_kernel", "bf16")
MERGED_LISTS = {BLOCKS, ("_fine_scores_fwd_kernel", "bf16"), ("_merge_lists_fwd_kernel", "")}
GRANULAR_EXPERTS = {
    BLOCKS,
    ("_granular_experts_fwd_kernel", "bf16"),
    ("_granular_experts_bwd_kernel", "bf16"),
    ("_expert_weight_bwd_kernel", "bf16"),
}
LAUNCHES = {
    "norm": {("_normalize_kernel", ""), ("_batch_sums_kernel", "")},
    "coarse": {ASSIGN},
    "coarse-deterministic": {ASSIGN} | STATISTICS,
    "ranking": {("_group_maxima_fwd_kernel", "bf16"), ("_candidates_fwd_kernel", "bf16")},
    "exchange": {(f"_{name}_fwd_kernel", "") for name in ("count", "plan", "pack", "combine")},
    "fine-scores": FINE_SCORES,
    "fine-scores-deterministic": FINE_SCORES | {PAIR_WEIGHT},
    "fine-scores-bias": {BLOCKS, ("_fine_scores_fwd_kernel", "bf16"), ("_fine_scores_bwd_weight_kernel", "plain")},
    "fine-topk": {BLOCKS, FINE_TOPK},
    "fine-topk-of-lists": MERGED_LISTS,
    "fine-topk-of-lists-biased": MERGED_LISTS,
    "fine-topk-of-lists-largest": MERGED_LISTS,
    "pair-products": {BLOCKS, ("_pair_dots_fwd_kernel", ""), PAIR_SUMS, PAIR_WEIGHT},
    "selected-scores": {BLOCKS, PAIR_SUMS, PAIR_WEIGHT},
    "granular-experts": GRANULAR_EXPERTS | {("_expert_sums_fwd_kernel", "bf16")},
    "granular-experts-deterministic": GRANULAR_EXPERTS | {PAIR_SUMS},
}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> dict[str, list[dict]]:
    """Launches of each case, see ``compile_kernels.compile_case``; compiled anew, in a process without interpreter."""
    folder = tmp_path_factory.mktemp("compiled")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    result = run(
        [sys.executable, "-m", "tests.ops.compile_kernels", folder / "launches.json"],
        cwd=Path(__file__).parents[2],
        env=environment | {"TRITON_CACHE_DIR": str(folder / "cache")},
    )
    assert result.returncode == 0, result.stderr
    return json.loads((folder / "launches.json").read_text())


@pytest.mark.parametrize("case", LAUNCHES)
def test_launches_compile_and_fit(case, compiled):
    errors = [f"{launch['kernel']}: {launch['error']}" for launch in compiled[case] if "error" in launch]
    assert not errors, "\n".join(errors)
    assert {(launch["kernel"], launch["products"]) for launch in compiled[case]} == LAUNCHES[case]
    assert {launch["kernel"]: launch["shared"] for launch in compiled[case] if launch["shared"] > SHARED_MEMORY} == {}


def test_no_kernel_and_no_case_is_left_out(compiled):
    files = (Path(air_moe_megatron.__file__).parent / "ops").rglob("*.py")
    kernels = {name for file in files for name in re.findall(r"^def (_\w+_kernel)\(", file.read_text(), re.MULTILINE)}
    assert kernels == {kernel for launches in LAUNCHES.values() for kernel, _ in launches}
    assert compiled.keys() == LAUNCHES.keys()
