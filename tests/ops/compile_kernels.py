"""Compile the launches of every kernel for sm_90 without a GPU: `python -m tests.ops.compile_kernels OUT.json`.

The public functions of ``ops/*/kernels.py`` are called with CPU tensors. Triton asks a driver only for the target, and
each launch stops once Triton and its ptxas have made the binary. Runs in a process of its own, with TRITON_INTERPRET
unset: Triton decides when a kernel is defined.

Legend: T tokens, H hidden, E experts, C clusters, L shortlist, K top-k, R rows, N pairs, D ranks.
"""

import json
import multiprocessing
import re
import sys
from pathlib import Path

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from air_moe_megatron.ops.coarse.kernels import assign_with_statistics
from air_moe_megatron.ops.exchange.kernels import combine, make_plan, pack
from air_moe_megatron.ops.fine_scores import kernels as fine_scores_kernels
from air_moe_megatron.ops.fine_scores import topk_kernels
from air_moe_megatron.ops.granular_experts import kernels as granular_experts_kernels
from air_moe_megatron.ops.norm.kernels import batch_sums, normalize
from air_moe_megatron.ops.pair_products import kernels as pair_kernels
from air_moe_megatron.ops.pair_products import make_pairs
from air_moe_megatron.ops.ranking.kernels import rank_experts
from air_moe_megatron.ops.selected_scores import kernels as selected_scores_kernels

T, H, E, C, L, K = 512, 512, 4096, 8, 512, 64
BF16 = torch.bfloat16


class Sm90Driver:
    """What Triton asks a driver for before it runs a kernel."""

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)


def products_of(compiled) -> str:
    """What the matrix products multiply: operand types of tensor-core instructions, "plain" for any without them."""
    found = set(re.findall(r"mma(?:_async)?\.sync\.aligned\.\S*?f32\.(bf16|f16|tf32)\.", compiled.asm["ptx"]))
    results = re.findall(r"= tt\.dot .* -> (tensor<.*?>)", compiled.asm["ttgir"])
    if not all("#mma" in result for result in results):
        found.add("plain")
    return "+".join(sorted(found))


def compile_case(case) -> list[dict]:
    """Every launch of a case: its kernel, and bytes of shared memory and products, or why it does not compile."""
    launches = []
    run = JITFunction.run

    def compile_only(kernel, *args, grid, warmup, **kwargs):
        launch = {"kernel": kernel.__name__}
        launches.append(launch)
        try:
            compiled = run(kernel, *args, grid=grid, warmup=True, **kwargs)
        except Exception as error:  # reported, so that the other launches are compiled too
            launch["error"] = f"{type(error).__name__}: {error}"
            return
        launch.update(shared=compiled.metadata.shared, products=products_of(compiled))

    JITFunction.run = compile_only
    try:
        case()
    finally:
        JITFunction.run = run
    return launches


def leaf(*shape, dtype=BF16):
    return torch.zeros(shape, dtype=dtype, requires_grad=True)


def backward(outputs, leaves):
    torch.autograd.grad(outputs, leaves, [torch.ones_like(output) for output in outputs])


def coarse(num_tokens, deterministic):
    hidden, codewords = torch.zeros(num_tokens, H, dtype=BF16), torch.zeros(256, H)
    allowed, padding_mask = torch.ones(256, dtype=torch.bool), torch.zeros(num_tokens, dtype=torch.bool)
    assign_with_statistics(hidden, codewords, 2, allowed, padding_mask, deterministic)


def ranking():
    weight, bias = torch.zeros(16384, H, dtype=BF16), torch.zeros(16384, dtype=BF16)
    rank_experts(torch.zeros(128, H), torch.ones(128), weight, bias, 32, "sqrtsoftplus", torch.zeros(16384))


def exchange():
    num_ranks, topk, hidden, probs = 8, 8, leaf(T, 2048), leaf(T, 8, dtype=torch.float32)
    plan = make_plan(torch.zeros(T, topk, dtype=torch.int32), probs, num_ranks, E // num_ranks)
    rows, _, row_probs = pack(hidden, probs, plan, T * num_ranks, T * topk)
    backward((rows, row_probs), (hidden, probs))
    partial_sums = leaf(*rows.shape)
    backward((combine(partial_sums, plan),), (partial_sums,))


def lists():
    """Shortlists [C, L] and the codewords [T, 1] of the tokens."""
    return torch.arange(C * L).view(C, L), torch.arange(T).view(T, 1) % C


def fine_scores(deterministic):
    hidden, weight, bias = leaf(T, H), leaf(E, H), torch.zeros(E, dtype=BF16)
    scores = fine_scores_kernels.fine_scores(hidden, weight, bias, *lists(), torch.float32, deterministic)
    backward((scores,), (hidden, weight))


def fine_scores_bias():
    """The gradient of the bias is the product with a column of fp32 ones."""
    hidden, weight, bias = torch.zeros(T, H, dtype=BF16), torch.zeros(E, H, dtype=BF16), leaf(E)
    backward((fine_scores_kernels.fine_scores(hidden, weight, bias, *lists(), torch.float32),), (bias,))


def fine_topk():
    inputs = torch.zeros(T, H, dtype=BF16), torch.zeros(E, H, dtype=BF16), torch.zeros(E, dtype=BF16)
    topk_kernels.fine_topk(*inputs, *lists(), K, torch.float32)


def fine_topk_of_lists(num_probes, topk, score_function=None):
    inputs = torch.zeros(T, H, dtype=BF16), torch.zeros(E, H, dtype=BF16), torch.zeros(E, dtype=BF16)
    probes = (torch.arange(T).view(T, 1) + torch.arange(num_probes)) % C
    expert_bias = None if score_function is None else torch.zeros(E)
    topk_kernels.fine_topk(*inputs, lists()[0], probes, topk, torch.float32, score_function, expert_bias)


def pair_products():
    pairs = make_pairs(torch.arange(T).repeat_interleave(8), torch.arange(8 * T) % E, T, E)
    hidden, weight, values = leaf(T, H), leaf(E, H), leaf(8 * T)
    backward((pair_kernels.pair_dots(hidden, weight, pairs),), (hidden, weight))
    backward((pair_kernels.pair_sums(values, weight, pairs),), (values, weight))


def selected_scores():
    """As the recommended mixture has it: parameters in bf16, scores in fp32."""
    hidden, weight, bias = leaf(T, H), leaf(E, H), leaf(E)
    ids = torch.arange(T * K).view(T, K) % E
    backward(
        (selected_scores_kernels.selected_scores(hidden, weight, bias, ids, torch.zeros(T, K)),), (hidden, weight, bias)
    )


def granular_experts(deterministic):
    """Gated experts of 8 rows, with 64 pairs each."""
    pairs = make_pairs(torch.arange(T).repeat_interleave(8), torch.arange(8 * T) % 64, T, 64)
    leaves = leaf(T, H), leaf(64, 16, H), leaf(64, 8, H), leaf(8 * T, dtype=torch.float32)
    backward((granular_experts_kernels.granular_experts(*leaves, pairs, "silu", deterministic),), leaves)


def norm():
    hidden, vector = leaf(T, H), torch.zeros(H)
    batch_sums(hidden, vector, torch.zeros(T, dtype=torch.bool))
    batch_sums(hidden, vector, None)
    backward((normalize(hidden, vector, vector),), (hidden,))


CASES = {
    "norm": norm,
    "coarse": lambda: coarse(8192, deterministic=False),
    "coarse-deterministic": lambda: coarse(T, deterministic=True),
    "ranking": ranking,
    "exchange": exchange,
    "fine-scores": lambda: fine_scores(deterministic=False),
    "fine-scores-deterministic": lambda: fine_scores(deterministic=True),
    "fine-scores-bias": fine_scores_bias,
    "fine-topk": fine_topk,
    "fine-topk-of-lists": lambda: fine_topk_of_lists(8, 256),
    "fine-topk-of-lists-biased": lambda: fine_topk_of_lists(1, 64, "sqrtsoftplus"),
    "fine-topk-of-lists-largest": lambda: fine_topk_of_lists(8, 2048),
    "pair-products": pair_products,
    "selected-scores": selected_scores,
    "granular-experts": lambda: granular_experts(deterministic=False),
    "granular-experts-deterministic": lambda: granular_experts(deterministic=True),
}


def main(out: str) -> None:
    driver.set_active(Sm90Driver())
    torch.empty = torch.zeros  # no kernel fills it, and some of it is indices
    with multiprocessing.get_context("fork").Pool() as pool:
        launches = pool.map(_compile_named, CASES, chunksize=1)
    Path(out).write_text(json.dumps(dict(zip(CASES, launches, strict=True))))


def _compile_named(name: str) -> list[dict]:
    return compile_case(CASES[name])


if __name__ == "__main__":
    main(sys.argv[1])
