"""The exchange's permutations: kernels against naive.py, bit for bit."""

import math

import pytest
import torch

from air_moe_megatron.ops import exchange
from air_moe_megatron.ops.exchange import kernels
from air_moe_megatron.ops.exchange.kernels import combine, make_plan, pack
from air_moe_megatron.ops.exchange.naive import naive_combine, naive_counts, naive_pack, naive_row_tokens

pytestmark = pytest.mark.usefixtures("poisoned_memory")

# Everything is copied, or added in a fixed order in fp32: no tolerance.
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# T, H, K, D, experts of a rank
SHAPES = {
    "odd-sizes": (11, 33, 5, 3, 7),
    "one-rank": (9, 16, 3, 1, 11),
    "more-ranks-than-experts-per-token": (7, 8, 2, 37, 2),
    "one-expert-per-rank": (9, 8, 6, 20, 1),
    "several-blocks-of-slots": (5, 9, 40, 4, 12),
    "no-tokens": (0, 33, 4, 3, 2),
    "one-token": (1, 33, 4, 3, 2),
    "one-everything": (1, 1, 1, 1, 1),
}


def randn(generator, shape, dtype):
    """Normal numbers; in bf16 quarters, whose sums are exact: the interpreter cuts sums off where they are rounded."""
    numbers = torch.randn(shape, generator=generator)
    return (numbers.mul(4).round().clamp(-8, 8) / 4 if dtype == torch.bfloat16 else numbers).to(dtype)


def make_inputs(shape, dtype, device, id_dtype=torch.int32, absent=0.2, seed=0):
    """Tokens, distinct experts per token of which some are -1, probs."""
    num_tokens, hidden_size, topk, num_ranks, num_local_experts = shape
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(num_tokens, num_ranks * num_local_experts, generator=generator).argsort(dim=1)
    ids = order[:, :topk].masked_fill(torch.rand(num_tokens, topk, generator=generator) < absent, -1)
    hidden = randn(generator, (num_tokens, hidden_size), dtype)
    probs = torch.rand(num_tokens, topk, generator=generator).to(dtype)
    return hidden.to(device), ids.to(id_dtype).to(device), probs.to(device)


def sizes(plan):
    """R and N, as the caller reads them."""
    return plan.counts[:, :2].sum(dim=0).tolist()


def gradients(outputs, leaves, seed=1):
    generator = torch.Generator().manual_seed(seed)
    grads = [randn(generator, out.shape, out.dtype).to(out.device) for out in outputs]
    return torch.autograd.grad(outputs, leaves, grads)


def assert_equal(found, expected):
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)


def combine_in_order(partial_sums, row_tokens, num_tokens):
    """``naive_combine`` on the CPU, which adds the rows in their order; a GPU adds them in any."""
    return naive_combine(partial_sums.cpu(), row_tokens.cpu(), num_tokens).to(partial_sums.device)


def assert_equals_naive(inputs, num_ranks, num_local_experts):
    hidden, ids, probs = inputs
    layout = (num_ranks, num_local_experts)
    plan = make_plan(ids, probs, *layout)
    assert_equal(plan.counts, naive_counts(ids, probs, *layout))
    num_rows, num_pairs = sizes(plan)

    leaves = [hidden.clone().requires_grad_(), probs.clone().requires_grad_()]
    naive_leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    rows, codes, row_probs = pack(*leaves, plan, num_rows, num_pairs)
    naive_rows, naive_codes, naive_row_probs = naive_pack(naive_leaves[0], ids, naive_leaves[1], *layout)
    assert_equal(rows, naive_rows)
    assert_equal(codes, naive_codes)
    assert_equal(row_probs, naive_row_probs)
    grad_hidden, grad_probs = gradients((rows, row_probs), leaves)
    # Autograd's own sums over a token's rows are made in its dtype; the dispatcher's combine shows the exact ones.
    row_tokens = naive_row_tokens(ids, *layout)
    generator = torch.Generator().manual_seed(1)
    grad_rows = randn(generator, rows.shape, rows.dtype).to(rows.device)
    assert_equal(grad_hidden, combine_in_order(grad_rows, row_tokens, hidden.shape[0]))
    assert_equal(grad_probs, gradients((naive_rows, naive_row_probs), naive_leaves)[1])

    partial_sums = randn(generator, rows.shape, rows.dtype).to(rows.device).requires_grad_()
    naive_sums = partial_sums.detach().clone().requires_grad_()
    combined, expected = combine(partial_sums, plan), combine_in_order(naive_sums, row_tokens, hidden.shape[0])
    assert_equal(combined, expected)
    assert_equal(gradients([combined], [partial_sums])[0], gradients([expected], [naive_sums])[0])


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_equals_naive(shape, kernel_device):
    assert_equals_naive(make_inputs(shape, torch.float32, kernel_device), *shape[3:])


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_other_dtypes_equal_naive(dtype, kernel_device):
    shape = SHAPES["odd-sizes"]
    assert_equals_naive(make_inputs(shape, dtype, kernel_device), *shape[3:])


@pytest.mark.parametrize("absent", (0.0, 1.0), ids=("every-place-taken", "no-pairs"))
def test_full_and_empty_plans(absent, kernel_device):
    shape = SHAPES["odd-sizes"]
    assert_equals_naive(make_inputs(shape, torch.float32, kernel_device, absent=absent), *shape[3:])


def test_every_token_on_one_rank(kernel_device):
    hidden, _, probs = make_inputs((7, 33, 4, 3, 9), torch.float32, kernel_device)
    ids = 9 + torch.arange(4, dtype=torch.int32, device=kernel_device).repeat(7, 1)
    assert_equals_naive((hidden, ids, probs), 3, 9)


def test_several_blocks_of_tokens_and_columns(monkeypatch, kernel_device):
    monkeypatch.setattr(kernels, "_TILE_ELEMENTS", 8 * 16 * 4)
    monkeypatch.setattr(kernels, "_MAX_COLUMNS", 4)
    shape = SHAPES["one-expert-per-rank"]
    assert_equals_naive(make_inputs(shape, torch.float32, kernel_device), *shape[3:])


@pytest.mark.parametrize("id_dtype", (torch.int32, torch.int64), ids=str)
def test_invalid_ids_and_probs_are_counted_and_travel_nowhere(id_dtype, kernel_device):
    hidden, ids, probs = make_inputs((37, 33, 5, 3, 7), torch.float32, kernel_device, id_dtype)
    ids[3, 2], ids[4, 0], ids[36, 4] = 21, -2, torch.iinfo(id_dtype).max
    probs[0, 0], probs[1, 1], probs[2, 2], probs[36, 3] = math.nan, math.inf, -math.inf, math.nan
    plan = make_plan(ids, probs, 3, 7)
    assert plan.counts[:, 2:].tolist() == [[3, 4, 0]] * 3
    assert_equal(plan.counts, naive_counts(ids, probs, 3, 7))
    rows, codes, _ = pack(hidden, probs, plan, *sizes(plan))
    expected = naive_pack(hidden, ids, probs, 3, 7)
    assert_equal(rows, expected[0])
    assert_equal(codes, expected[1])


def test_a_mismatch_is_told_to_every_rank(kernel_device):
    """Its ids and probs are stand-ins: no pair goes anywhere."""
    ids = torch.full((5, 1), -1, device=kernel_device)
    probs = torch.zeros(5, 1, device=kernel_device)
    plan = make_plan(ids, probs, 3, 7, mismatch=True)
    assert plan.counts.tolist() == [[0, 0, 0, 0, 1]] * 3
    assert_equal(plan.counts, naive_counts(ids, probs, 3, 7, mismatch=True))


def test_plan_lists_rows_and_slots(kernel_device):
    shape = SHAPES["more-ranks-than-experts-per-token"]
    hidden, ids, probs = make_inputs(shape, torch.float32, kernel_device)
    plan = make_plan(ids, probs, *shape[3:])
    row_tokens = naive_row_tokens(ids, *shape[3:])
    for token, rows in enumerate(plan.token_rows.tolist()):
        expected = (row_tokens == token).nonzero().flatten().tolist()
        assert rows == expected + [-1] * (plan.token_rows.shape[1] - len(expected))
    is_pair = ids >= 0
    assert torch.equal(plan.pair_slots >= 0, is_pair)
    slots = plan.pair_slots[is_pair]
    assert torch.equal(slots.sort().values.long(), torch.arange(is_pair.sum(), device=kernel_device))


def test_strided_inputs_equal_contiguous_ones(kernel_device):
    hidden, ids, probs = make_inputs(SHAPES["odd-sizes"], torch.float32, kernel_device)
    assert_equals_naive(tuple(x.t().contiguous().t() for x in (hidden, ids, probs)), 3, 7)


def test_only_one_output_in_the_loss(kernel_device):
    hidden, ids, probs = make_inputs(SHAPES["odd-sizes"], torch.float32, kernel_device)
    plan = make_plan(ids, probs, 3, 7)
    leaves = [hidden.requires_grad_(), probs.requires_grad_()]
    rows, codes, row_probs = pack(*leaves, plan, *sizes(plan))
    assert not codes.requires_grad
    grad_hidden, grad_probs = torch.autograd.grad(row_probs.sum(), leaves)
    assert not grad_hidden.any() and torch.equal(grad_probs, (ids >= 0).float())


def test_worked_examples(kernel_device):
    ids = torch.tensor([[0, 3, 1], [2, -1, -1]], device=kernel_device)
    probs = torch.tensor([[0.1, 0.2, 0.3], [0.4, 0.0, 0.0]], device=kernel_device)
    plan = make_plan(ids, probs, 2, 2)
    assert plan.counts.tolist() == [[1, 2, 0, 0, 0], [2, 2, 0, 0, 0]]
    assert plan.token_rows.tolist() == [[0, 1], [2, -1]]
    assert plan.pair_slots.tolist() == [[0, 2, 1], [3, -1, -1]]
    assert plan.codes.tolist() == [[~0, ~1, 1], [~0, -1, -1]]
    rows, codes, row_probs = pack(torch.tensor([[7.0], [8.0]], device=kernel_device), probs, plan, 3, 4)
    assert rows.tolist() == [[7], [7], [8]]
    assert codes.tolist() == [~0, 1, ~1, ~0]
    assert torch.equal(row_probs, probs.flatten()[[0, 2, 1, 3]])
    assert combine(torch.tensor([[1.0], [2.0], [3.0]], device=kernel_device), plan).tolist() == [[3], [3]]


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda hidden, ids, probs, plan: exchange.make_plan(ids[0], probs[0], 3, 7), r"\[T, K\]"),
        (lambda hidden, ids, probs, plan: exchange.make_plan(ids[:, :0], probs[:, :0], 3, 7), "K at least 1"),
        (lambda hidden, ids, probs, plan: exchange.make_plan(ids, probs[1:], 3, 7), "must both be"),
        (lambda hidden, ids, probs, plan: exchange.make_plan(ids, probs, 2**16, 2**15), "2\\^31"),
        (lambda hidden, ids, probs, plan: exchange.pack(hidden[1:], probs, plan, 1, 1), r"hidden \(10, 33\)"),
        (lambda hidden, ids, probs, plan: exchange.pack(hidden, probs[:, 1:], plan, 1, 1), "plan's T and K"),
        (lambda hidden, ids, probs, plan: exchange.combine(hidden[0], plan), r"\[R, H\]"),
    ],
    ids=["one-token", "no-slots", "probs", "experts", "hidden", "other-plan", "sums"],
)
def test_what_does_not_fit_is_refused(call, message, backend):
    hidden, ids, probs = make_inputs(SHAPES["odd-sizes"], torch.float32, "cpu")
    plan = exchange.make_plan(ids, probs, 3, 7)
    assert isinstance(plan, kernels.ExchangePlan) == (backend == "triton")
    with pytest.raises(ValueError, match=message):
        call(hidden, ids, probs, plan)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize(
    "shape",
    [(8192, 2048, 512, 8, 512), (4096, 1024, 16, 1024, 16), (2048, 512, 512, 1024, 64)],
    ids=("many-pairs", "many-ranks", "many-pairs-and-ranks"),
)
def test_large(shape, dtype, cuda):
    num_tokens, hidden_size, topk, num_ranks, num_local_experts = shape
    generator = torch.Generator(cuda).manual_seed(0)
    first = torch.randint(num_ranks * num_local_experts, (num_tokens, 1), generator=generator, device=cuda)
    stride = num_ranks * num_local_experts // topk - 1  # so many apart, the experts of a token are distinct
    ids = (first + stride * torch.arange(topk, device=cuda)) % (num_ranks * num_local_experts)
    hidden = torch.randn(num_tokens, hidden_size, generator=generator, device=cuda).to(dtype)
    probs = torch.rand(num_tokens, topk, generator=generator, device=cuda)
    layout = (num_ranks, num_local_experts)
    plan = make_plan(ids, probs, *layout)
    rows, codes, row_probs = pack(hidden, probs, plan, *sizes(plan))
    for found, expected in zip((rows, codes, row_probs), naive_pack(hidden, ids, probs, *layout), strict=True):
        assert_equal(found, expected)
    # On a GPU the reference adds in any order: whole numbers, so that all give the same.
    whole = torch.randint(-3, 4, rows.shape, generator=generator, device=cuda).float()
    expected = naive_combine(whole, naive_row_tokens(ids, *layout), num_tokens)
    assert_equal(combine(whole, plan), expected)
    runs = [combine(rows, plan) for _ in range(2)]
    assert_equal(*runs)


@pytest.mark.gpu
def test_rows_beyond_2_31_elements(cuda):
    num_tokens, hidden_size = 2**20 + 5, 2048
    hidden = torch.zeros(num_tokens, hidden_size, dtype=torch.bfloat16, device=cuda)
    hidden[-7:] = torch.arange(1, 8, device=cuda).unsqueeze(1).bfloat16()
    ids = torch.tensor([[0, 1]], device=cuda).repeat(num_tokens, 1)
    plan = make_plan(ids, ids.float(), 2, 1)
    rows, codes, row_probs = pack(hidden, ids.float(), plan, *sizes(plan))
    assert torch.equal(rows[num_tokens - 7 : num_tokens], hidden[-7:]) and torch.equal(rows[-7:], hidden[-7:])
    assert (codes == ~0).all() and not row_probs[:num_tokens].any() and (row_probs[num_tokens:] == 1).all()
    assert torch.equal(combine(rows, plan)[-9:], 2 * hidden[-9:])
