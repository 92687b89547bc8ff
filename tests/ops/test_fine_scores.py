"""Fine scores: the torch version against naive.py, forward and all gradients."""

import pytest
import torch

from air_moe_megatron.ops.fine_scores import eager, fine_scores, fine_topk
from air_moe_megatron.ops.fine_scores.naive import naive_fine_scores, naive_fine_topk

# Largest error, as the root mean square of the difference over that of the reference. The reference is naive.py in
# fp64 on the same (rounded) inputs.
TOLERANCES = {
    torch.float64: 1e-13,  # a few hundred additions in another order
    torch.float32: 2e-6,  # the same
    torch.bfloat16: 6e-3,  # 8 bits of mantissa: one rounding of a result costs 1.7e-3, sums of a few such thrice that
}

# T, H, E, C, L, P
SHAPES = {
    "one-probe": (33, 16, 24, 5, 7, 1),
    "two-probes": (33, 16, 24, 5, 7, 2),
    "three-probes": (29, 17, 31, 6, 5, 3),
    "odd-sizes": (13, 7, 11, 3, 3, 1),
    "no-tokens": (0, 8, 12, 3, 4, 2),
    "one-token": (1, 8, 12, 3, 4, 2),
    "one-everything": (1, 1, 1, 1, 1, 1),
    "more-probes-than-a-byte-counts": (3, 4, 150, 140, 2, 140),
    "full-list": (19, 8, 12, 1, 12, 1),
    "more-codewords-than-tokens": (4, 8, 64, 40, 9, 1),
    "expert-in-every-list": (500, 16, 32, 100, 32, 1),
}


def make_inputs(shape, dtype, with_bias, padded, seed=0):
    """Random inputs; with ``padded``, lists of length 0, 1, 2, ... filled up with -1."""
    num_tokens, hidden_size, num_experts, num_clusters, shortlist_size, num_probes = shape
    generator = torch.Generator().manual_seed(seed)

    def randn(*size):
        return torch.randn(*size, generator=generator).to(dtype)

    hidden, weight = randn(num_tokens, hidden_size), randn(num_experts, hidden_size)
    bias = randn(num_experts) if with_bias else None
    lists = [torch.randperm(num_experts, generator=generator)[:shortlist_size] for _ in range(num_clusters)]
    shortlist = torch.stack(lists).sort(dim=1).values
    if padded:
        lengths = torch.arange(num_clusters).unsqueeze(1) % (shortlist_size + 1)
        shortlist = shortlist.masked_fill(torch.arange(shortlist_size) >= lengths, -1)
    rows = [torch.randperm(num_clusters, generator=generator)[:num_probes] for _ in range(num_tokens)]
    probes = torch.stack(rows) if rows else torch.zeros(0, num_probes, dtype=torch.int64)
    return hidden, weight, bias, shortlist, probes


def scores_and_gradients(function, inputs, dtype, seed=1):
    """Scores, and the gradients of hidden, weight and bias for random gradients of the finite scores."""
    hidden, weight, bias, shortlist, probes = inputs
    leaves = [tensor.clone().requires_grad_() for tensor in (hidden, weight, bias) if tensor is not None]
    scores = function(*leaves[:2], leaves[2] if bias is not None else None, shortlist, probes, dtype)
    generator = torch.Generator().manual_seed(seed)
    grad_scores = torch.randn(scores.shape, generator=generator, dtype=torch.float64).to(scores.dtype)
    grad_scores = grad_scores.masked_fill(scores.isinf(), 0.0)
    return scores.detach(), torch.autograd.grad(scores, leaves, grad_scores)


def relative_error(actual, reference):
    """Root mean square of the difference over that of the reference."""
    if reference.numel() == 0:
        return 0.0
    return ((actual.double() - reference).norm() / reference.norm().clamp_min(1e-30)).item()


def assert_equals_naive(shape, dtype, with_bias, padded):
    inputs = make_inputs(shape, dtype, with_bias, padded)
    reference = tuple(x.double() if torch.is_tensor(x) and x.is_floating_point() else x for x in inputs)
    scores, gradients = scores_and_gradients(fine_scores, inputs, dtype)
    # The gradients fed in are rounded to dtype there; feed the reference the same ones.
    expected, expected_gradients = scores_and_gradients(
        lambda *args: naive_fine_scores(*args).to(dtype).double(), reference, torch.float64
    )
    assert scores.dtype == dtype and scores.shape == (shape[0], shape[5], shape[4])
    assert torch.equal(scores.isinf(), expected.isinf())
    tolerance = TOLERANCES[dtype]
    assert relative_error(scores.masked_fill(scores.isinf(), 0), expected.masked_fill(expected.isinf(), 0)) <= tolerance
    for name, gradient, wanted, leaf in zip(
        ("hidden", "weight", "bias"), gradients, expected_gradients, inputs, strict=False
    ):
        assert gradient.dtype == leaf.dtype and gradient.shape == leaf.shape, name
        assert relative_error(gradient, wanted) <= tolerance, name


@pytest.mark.parametrize("padded", (False, True), ids=("full", "padded"))
@pytest.mark.parametrize("with_bias", (False, True), ids=("no-bias", "bias"))
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_equals_naive(shape, dtype, with_bias, padded):
    assert_equals_naive(shape, dtype, with_bias, padded)


@pytest.mark.parametrize("limit", (1, 16 * 4, 16 * 7), ids=("one-list", "longest-list", "two-lists"))
def test_equals_naive_over_several_batches(monkeypatch, limit):
    monkeypatch.setattr(eager, "_BATCH_ELEMENTS", limit)
    inputs = make_inputs(SHAPES["two-probes"], torch.float32, True, True)
    assert len(eager._group(inputs[3], inputs[4], 16).batches) > 1
    assert_equals_naive(SHAPES["two-probes"], torch.float32, True, True)


@pytest.mark.parametrize("min_fill", (0.0, 1.0), ids=("all-padded-alike", "equal-rows-only"))
def test_padding_of_a_batch_changes_nothing(monkeypatch, min_fill):
    """Codewords with 1 to 9 rows, in one batch or in one for each number of rows."""
    monkeypatch.setattr(eager, "_MIN_FILL", min_fill)
    probes = torch.arange(9).repeat_interleave(torch.arange(1, 10)).unsqueeze(1)
    num_tokens = probes.shape[0]
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(num_tokens, 16, generator=generator).requires_grad_()
    weight = torch.randn(30, 16, generator=generator).requires_grad_()
    shortlist = torch.rand(10, 30, generator=generator).argsort(dim=1)[:, :7]
    order = torch.randperm(num_tokens, generator=generator)
    batches = eager._group(shortlist, probes[order], 16).batches
    assert [batch.shape[1] for batch in batches] == ([9] if min_fill == 0.0 else list(range(9, 0, -1)))
    grad = torch.randn(num_tokens, 1, 7, generator=generator)
    found = fine_scores(hidden, weight, None, shortlist, probes[order], torch.float32)
    expected = naive_fine_scores(hidden, weight, None, shortlist, probes[order], torch.float32)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    for got, wanted in zip(
        torch.autograd.grad(found, (hidden, weight), grad),
        torch.autograd.grad(expected, (hidden, weight), grad),
        strict=True,
    ):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


def test_gradients_of_the_centers_go_into_main_grad():
    hidden, weight, _, shortlist, probes, *_ = make_inputs(SHAPES["two-probes"], torch.float32, False, True)
    grads = []
    for fused in (False, True):
        centers = torch.nn.Parameter(weight.detach().clone())
        if fused:
            centers.main_grad = torch.ones_like(centers)
        scores = fine_scores(hidden, centers, None, shortlist, probes, torch.float32)
        scores[scores.isfinite()].sum().backward()
        grads.append(centers.main_grad if fused else centers.grad)
    assert centers.grad_added_to_main_grad
    torch.testing.assert_close(grads[1], 1.0 + grads[0])


def test_a_narrow_main_grad_is_rounded_once():
    """An expert in the lists of nine codewords: 256 and then eight times 1, which bf16 sums would lose one by one."""
    hidden = torch.ones(9, 4, dtype=torch.bfloat16)
    centers = torch.nn.Parameter(torch.ones(2, 4, dtype=torch.bfloat16))
    centers.main_grad = torch.zeros_like(centers)
    shortlist, probes = torch.zeros(9, 1, dtype=torch.int32), torch.arange(9).unsqueeze(1)
    scores = fine_scores(hidden, centers, None, shortlist, probes, torch.float32)
    scores.backward(torch.tensor([256.0] + 8 * [1.0]).view_as(scores))
    assert (centers.main_grad[0] == 264).all() and (centers.main_grad[1] == 0).all()


def test_worked_example():
    scores = fine_scores(
        torch.tensor([[1.0, 2.0]]),
        torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]),
        None,
        torch.tensor([[0, 2]]),
        torch.tensor([[0]]),
        torch.float32,
    )
    assert scores.tolist() == [[[1.0, 3.0]]]


def test_every_token_on_one_codeword_leaves_the_other_clusters_without_gradient():
    hidden, weight, _, shortlist, probes = make_inputs((9, 4, 20, 4, 5, 1), torch.float32, False, False)
    probes = torch.full_like(probes, 2)
    scores, (grad_hidden, grad_weight) = scores_and_gradients(
        fine_scores, (hidden, weight, None, shortlist, probes), torch.float32
    )
    torch.testing.assert_close(scores.squeeze(1), hidden @ weight[shortlist[2]].t())
    untouched = torch.ones(20, dtype=torch.bool)
    untouched[shortlist[2]] = False
    assert grad_weight[untouched].count_nonzero() == 0
    assert (grad_weight[~untouched] != 0).all() and (grad_hidden != 0).all()


def test_all_lists_empty_gives_no_scores_and_zero_gradients():
    hidden, weight, bias, shortlist, probes = make_inputs((5, 4, 6, 3, 2, 2), torch.float32, True, False)
    scores, gradients = scores_and_gradients(
        fine_scores, (hidden, weight, bias, torch.full_like(shortlist, -1), probes), torch.float32
    )
    assert (scores == float("-inf")).all()
    assert [gradient.count_nonzero().item() for gradient in gradients] == [0, 0, 0]


def test_gradients_at_absent_experts_are_ignored():
    inputs = make_inputs((9, 4, 12, 3, 4, 1), torch.float32, True, True)
    leaves = [tensor.clone().requires_grad_() for tensor in inputs[:3]]
    scores = fine_scores(*leaves, *inputs[3:], torch.float32)
    grad_scores = torch.ones_like(scores).masked_fill(scores.isinf(), float("nan"))
    for gradient in torch.autograd.grad(scores, leaves, grad_scores):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("wanted", ("hidden", "weight", "bias"))
def test_only_the_gradient_that_is_asked_for(wanted):
    hidden, weight, bias, shortlist, probes = make_inputs(SHAPES["two-probes"], torch.float32, True, True)
    _, everything = scores_and_gradients(fine_scores, (hidden, weight, bias, shortlist, probes), torch.float32)
    leaves = {"hidden": hidden, "weight": weight, "bias": bias}
    leaves[wanted].requires_grad_()
    scores = fine_scores(*leaves.values(), shortlist, probes, torch.float32)
    generator = torch.Generator().manual_seed(1)
    grad_scores = torch.randn(scores.shape, generator=generator, dtype=torch.float64).float()
    scores.backward(grad_scores.masked_fill(scores.isinf(), 0.0))
    torch.testing.assert_close(leaves[wanted].grad, everything[list(leaves).index(wanted)])
    assert [name for name, leaf in leaves.items() if leaf.grad is not None] == [wanted]


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
def test_arithmetic_in_the_router_dtype_not_in_that_of_the_inputs(dtype):
    inputs = make_inputs(SHAPES["two-probes"], torch.bfloat16, True, True)
    scores, gradients = scores_and_gradients(fine_scores, inputs, dtype)
    expected = naive_fine_scores(*(tensor.double() for tensor in inputs[:3]), *inputs[3:], torch.float64)
    assert scores.dtype == dtype
    present = expected.isfinite()
    assert relative_error(scores[present], expected[present]) <= TOLERANCES[dtype]
    assert {gradient.dtype for gradient in gradients} == {torch.bfloat16}


@pytest.mark.parametrize("with_bias", (False, True), ids=("no-bias", "bias"))
def test_gradcheck(with_bias):
    hidden, weight, bias, shortlist, probes = make_inputs((7, 3, 9, 4, 4, 2), torch.float64, with_bias, True)
    leaves = [tensor.requires_grad_() for tensor in (hidden, weight, bias) if tensor is not None]

    def finite_scores(hidden, weight, bias=None):
        scores = fine_scores(hidden, weight, bias, shortlist, probes, torch.float64)
        return scores[scores.isfinite()]

    assert torch.autograd.gradcheck(finite_scores, leaves)


def test_int32_lists_equal_int64_lists():
    hidden, weight, bias, shortlist, probes = make_inputs(SHAPES["two-probes"], torch.float32, True, True)
    expected = scores_and_gradients(fine_scores, (hidden, weight, bias, shortlist, probes), torch.float32)
    actual = scores_and_gradients(fine_scores, (hidden, weight, bias, shortlist.int(), probes), torch.float32)
    assert torch.equal(actual[0], expected[0])
    assert all(torch.equal(*pair) for pair in zip(actual[1], expected[1], strict=True))


SCORE_FUNCTIONS_OF_BIAS = (None, "sigmoid", "sqrtsoftplus")


def expert_bias_for(function, num_experts):
    """An expert bias that decides more than the scores do; None without a score function."""
    return None if function is None else torch.randn(num_experts, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("function", SCORE_FUNCTIONS_OF_BIAS)
@pytest.mark.parametrize("padded", (False, True), ids=("full-lists", "shorter-lists"))
@pytest.mark.parametrize("with_bias", (False, True), ids=("no-bias", "bias"))
@pytest.mark.parametrize("shape", SHAPES)
def test_the_best_of_the_lists(shape, with_bias, padded, function, monkeypatch):
    """An expert of several lists counts once; also where tokens and scores are cut into blocks."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **kwargs: empty(*size, **kwargs).fill_(-7))
    monkeypatch.setattr(eager, "_TABLE_ROWS", (3, 5))
    hidden, weight, bias, shortlist, probes = make_inputs(SHAPES[shape], torch.float64, with_bias, padded)
    num_candidates = probes.shape[1] * shortlist.shape[1]
    monkeypatch.setattr(eager, "SCORES_OF_BLOCK", 11 * num_candidates)
    expert_bias = expert_bias_for(function, weight.shape[0])
    for topk in {1, min(3, num_candidates), shortlist.shape[1], num_candidates, num_candidates + 2}:
        arguments = (hidden, weight, bias, shortlist.int(), probes, topk, torch.float64, function, expert_bias)
        scores, ids = fine_topk(*arguments)
        expected_scores, expected_ids = naive_fine_topk(*arguments)
        assert ids.dtype == torch.int32 and scores.dtype == torch.float64
        ids, order = ids.sort(dim=1)
        expected_ids, expected_order = expected_ids.sort(dim=1)
        assert torch.equal(ids, expected_ids)
        torch.testing.assert_close(
            scores.gather(1, order), expected_scores.gather(1, expected_order), rtol=1e-12, atol=1e-12
        )


@pytest.mark.parametrize("shape", ("two-probes", "three-probes", "full-list"))
@pytest.mark.parametrize("function", SCORE_FUNCTIONS_OF_BIAS)
def test_gradients_of_the_best(shape, function):
    hidden, weight, bias, shortlist, probes = make_inputs(SHAPES[shape], torch.float64, True, False)
    leaves = [leaf.requires_grad_() for leaf in (hidden, weight, bias)]
    expert_bias = expert_bias_for(function, weight.shape[0])
    results = []
    for operation in (fine_topk, naive_fine_topk):
        scores, ids = operation(*leaves, shortlist.int(), probes, 4, torch.float64, function, expert_bias)
        factors = torch.randn(weight.shape[0], generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        results.append(torch.autograd.grad((scores * factors[ids.long()]).square().sum(), leaves))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_candidates": 0}, r"num_candidates \(0\) must be at least 1"),
        ({"score_function": "sigmoid"}, "must be given together"),
        ({"expert_bias": torch.zeros(24)}, "must be given together"),
        ({"score_function": "softmax", "expert_bias": torch.zeros(24)}, r"score_function \('softmax'\) must be None"),
        ({"score_function": "sigmoid", "expert_bias": torch.zeros(23)}, r"expert_bias \(23,\) must be \[E\]"),
    ],
    ids=["no-candidates", "no-bias", "no-function", "unknown-function", "bias-of-others"],
)
def test_what_the_topk_cannot_do_is_refused(change, message):
    hidden, weight, bias, shortlist, probes = make_inputs(SHAPES["two-probes"], torch.float32, False, False)
    with pytest.raises(ValueError, match=message):
        fine_topk(hidden, weight, bias, shortlist, probes, **{"num_candidates": 2, "dtype": torch.float32} | change)


BAD_SHAPES = {
    "hidden-not-a-matrix": ((2, 3, 4), (5, 4), (2, 3), (6, 1), "hidden"),
    "weight-not-a-matrix": ((6, 4), (5,), (2, 3), (6, 1), "weight"),
    "hidden-sizes-differ": ((6, 4), (5, 3), (2, 3), (6, 1), "same H"),
    "probes-not-a-matrix": ((6, 4), (5, 4), (2, 3), (6,), "probes"),
    "probes-of-other-tokens": ((6, 4), (5, 4), (2, 3), (7, 1), "T = 6"),
    "shortlist-not-a-matrix": ((6, 4), (5, 4), (3,), (6, 1), "shortlist"),
}


@pytest.mark.parametrize("hidden, weight, shortlist, probes, message", BAD_SHAPES.values(), ids=BAD_SHAPES)
def test_bad_shapes_are_refused(hidden, weight, shortlist, probes, message):
    with pytest.raises(ValueError, match=message):
        fine_scores(
            torch.zeros(hidden),
            torch.zeros(weight),
            None,
            torch.zeros(shortlist, dtype=torch.int64),
            torch.zeros(probes, dtype=torch.int64),
            torch.float32,
        )
