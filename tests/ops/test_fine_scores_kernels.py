"""Fine scores as Triton kernels, with and without the top-k: against naive.py, forward and gradients."""

import pytest
import torch

from air_moe_megatron.ops.fine_scores import fine_topk, kernels, topk_kernels
from air_moe_megatron.ops.fine_scores.naive import naive_fine_scores, naive_fine_topk
from tests.ops.conftest import relative_error

# Root mean square of the difference over that of naive.py in fp64 on the same inputs. Sums are made in fp32; what is
# written in 16 bits is rounded once, by Triton's interpreter towards zero, and so are 16-bit gradients on their way in.
TOLERANCES = {torch.float32: 1e-6, torch.bfloat16: 6e-3, torch.float16: 8e-4}

# Interpreted, the elements that are masked out afterwards warn.
pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),
]

# T, H, E, C, L, P
SHAPES = {
    "two-probes": (21, 33, 24, 4, 7, 2),
    "one-codeword-in-two-blocks": (70, 17, 40, 1, 40, 1),
    "list-in-two-blocks": (5, 100, 150, 2, 140, 1),
    "one-everything": (1, 1, 1, 1, 1, 1),
    "no-tokens": (0, 8, 12, 3, 4, 2),
}


def make(shape, dtype, device, padded=True, integers=False):
    """Leaves hidden, weight, bias; shortlist and probes. ``padded``: lists of length 0, 1, 2, ..., then full.

    With ``integers`` every sum is exact in any dtype, and many scores are equal.
    """
    num_tokens, hidden_size, num_experts, num_clusters, shortlist_size, num_probes = shape
    generator = torch.Generator().manual_seed(sum(shape))

    def leaf(*size):
        values = torch.randn(*size, generator=generator)
        if integers:
            values = values.round().clamp(-2, 2)
        return values.to(dtype).to(device).requires_grad_()

    leaves = [leaf(num_tokens, hidden_size), leaf(num_experts, hidden_size), leaf(num_experts)]
    shortlist = torch.rand(num_clusters, num_experts, generator=generator).argsort(dim=1)[:, :shortlist_size]
    if padded and num_clusters > 1:
        lengths = torch.arange(num_clusters).unsqueeze(1) * max(1, shortlist_size // (num_clusters - 1))
        shortlist = shortlist.masked_fill(torch.arange(shortlist_size) >= lengths, -1)
    probes = torch.rand(num_tokens, num_clusters, generator=generator).argsort(dim=1)[:, :num_probes]
    return leaves, shortlist.to(device), probes.to(device)


def ascending(shortlist):
    """The lists as the index makes them: ascending ids, -1 at the end."""
    ids = shortlist.masked_fill(shortlist < 0, 2**31).sort(dim=1).values
    return ids.masked_fill(ids == 2**31, -1)


def widened(leaves):
    return [leaf.detach().double().requires_grad_() for leaf in leaves]


def assert_gradients_near(found, expected, leaves, tolerance):
    for name, got, wanted, leaf in zip(("hidden", "weight", "bias"), found, expected, leaves, strict=True):
        assert got.dtype == leaf.dtype and got.shape == leaf.shape, name
        assert relative_error(got, wanted) <= tolerance, name


def random_like(tensor, seed=1):
    values = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(seed))
    return values.to(tensor.dtype).to(tensor.device)


def assert_scores_equal_naive(shape, input_dtype, dtype, device, **options):
    leaves, shortlist, probes = make(shape, input_dtype, device)
    wide = widened(leaves)
    expected = naive_fine_scores(*wide, shortlist, probes, torch.float64)
    found = kernels.fine_scores(*leaves, shortlist, probes, dtype, **options)
    assert found.dtype == dtype and found.shape == expected.shape
    assert torch.equal(found.isneginf(), expected.isneginf())
    present = expected.isfinite()
    assert relative_error(found[present], expected[present]) <= TOLERANCES[dtype]
    grad = random_like(found).masked_fill(~present, 0.0)
    expected = torch.autograd.grad(expected, wide, grad.double())
    # What arrives where there is no expert does not count.
    found = torch.autograd.grad(found, leaves, grad.masked_fill(~present, float("nan")))
    assert_gradients_near(found, expected, leaves, TOLERANCES[input_dtype])
    return found


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_scores_and_gradients_equal_naive(shape, kernel_device):
    assert_scores_equal_naive(shape, torch.float32, torch.float32, kernel_device)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_narrow_dtypes_round_once(dtype, kernel_device):
    assert_scores_equal_naive(SHAPES["two-probes"], dtype, dtype, kernel_device)


@pytest.mark.parametrize("input_dtype", (torch.bfloat16, torch.float16), ids=str)
def test_arithmetic_is_that_of_the_router_dtype(input_dtype, kernel_device):
    """fp32 scores of 16-bit inputs are as exact as those of fp32 ones; their gradients are rounded once."""
    assert_scores_equal_naive(SHAPES["two-probes"], input_dtype, torch.float32, kernel_device)


def test_strided_biases_equal_contiguous_ones(kernel_device):
    (hidden, weight, bias), shortlist, probes = make((5, 8, 12, 2, 4, 1), torch.float32, kernel_device)
    strided = bias.detach().unsqueeze(1).repeat(1, 3)[:, 1]
    inputs = (shortlist, probes, torch.float32)
    with torch.no_grad():
        scores = [kernels.fine_scores(hidden, weight, values, *inputs) for values in (bias, strided)]
        ids = [
            topk_kernels.fine_topk(hidden, weight, values, *inputs[:2], 2, inputs[2])[1] for values in (bias, strided)
        ]
    assert torch.equal(*scores) and torch.equal(*ids)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_fp32_gradients_of_16_bit_inputs_keep_16_bits(dtype, kernel_device):
    leaves, shortlist, probes = make(SHAPES["two-probes"], dtype, kernel_device)
    weight = torch.nn.Parameter(leaves[1].detach())
    weight.main_grad = torch.zeros_like(weight, dtype=torch.float32)
    hidden, bias = leaves[0].detach(), leaves[2].detach()
    wide = widened([weight])[0]
    expected = naive_fine_scores(hidden.double(), wide, bias.double(), shortlist, probes, torch.float64)
    present = expected.isfinite()
    grad = random_like(expected.float()).masked_fill(~present, 0.0)
    (expected,) = torch.autograd.grad(expected, wide, grad.double())
    kernels.fine_scores(hidden, weight, bias, shortlist, probes, torch.float32).backward(grad)
    # The interpreter rounds the parts towards zero: both parts of fp16 inputs lose something.
    assert relative_error(weight.main_grad, expected) <= (2.0**-15 if dtype == torch.float16 else 2.0**-16)


@pytest.mark.parametrize("chunk", (1, 3), ids=lambda n: f"{n}-codewords")
def test_deterministic_gradients_equal_naive(chunk, monkeypatch, kernel_device):
    _, hidden_size, _, _, shortlist_size, _ = shape = SHAPES["two-probes"]
    monkeypatch.setattr(kernels, "_TILE_ELEMENTS", chunk * hidden_size * shortlist_size)
    found = assert_scores_equal_naive(shape, torch.float32, torch.float32, kernel_device, deterministic=True)
    monkeypatch.setattr(kernels, "_TILE_ELEMENTS", 4 * hidden_size * shortlist_size)
    again = assert_scores_equal_naive(shape, torch.float32, torch.float32, kernel_device, deterministic=True)
    assert all(torch.equal(*pair) for pair in zip(found, again, strict=True))


@pytest.mark.parametrize("deterministic", (False, True), ids=("atomic", "deterministic"))
def test_codewords_without_tokens_leave_their_experts_alone(deterministic, monkeypatch, kernel_device):
    """Also where a whole chunk of codewords has none."""
    monkeypatch.setattr(kernels, "_TILE_ELEMENTS", 2 * 8 * 5)
    leaves, shortlist, probes = make((9, 8, 60, 7, 5, 1), torch.float32, kernel_device, padded=False)
    probes = probes % 2 * 3  # codewords 0 and 3
    scores = kernels.fine_scores(*leaves, shortlist, probes, torch.float32, deterministic)
    wide = widened(leaves)
    expected = naive_fine_scores(*wide, shortlist, probes, torch.float64)
    assert relative_error(scores, expected) <= TOLERANCES[torch.float32]
    found = torch.autograd.grad(scores.sum(), leaves)
    assert_gradients_near(found, torch.autograd.grad(expected.sum(), wide), leaves, TOLERANCES[torch.float32])
    unused = torch.ones(60, dtype=torch.bool, device=kernel_device)
    unused[shortlist[[0, 3]]] = False
    assert found[1][unused].count_nonzero() == 0


@pytest.mark.parametrize(
    "dtype, deterministic",
    [(torch.float32, False), (torch.float32, True), (torch.bfloat16, False)],
    ids=("atomic", "deterministic", "bf16-main-grad"),
)
def test_main_grad_is_added_to_and_only_in_used_rows(dtype, deterministic, kernel_device):
    (hidden, weight, _), shortlist, probes = make((9, 16, 60, 4, 5, 1), torch.float32, kernel_device)
    unused = torch.ones(60, dtype=torch.bool, device=kernel_device)
    unused[shortlist[shortlist >= 0]] = False
    grads = []
    for fused in (False, True):
        centers = torch.nn.Parameter(weight.detach().clone())
        if fused:
            centers.main_grad = torch.full_like(centers, 3.0, dtype=dtype)
        scores = kernels.fine_scores(hidden, centers, None, shortlist, probes, torch.float32, deterministic)
        scores[scores.isfinite()].sum().backward()
        grads.append(centers.main_grad if fused else centers.grad)
    assert centers.grad_added_to_main_grad
    assert (grads[1][unused] == 3.0).all()
    assert relative_error(grads[1], 3.0 + grads[0].double()) <= TOLERANCES[dtype]


def naive_topk(leaves, shortlist, probes, topk, function=None, expert_bias=None):
    """Scores [T, K] and ids, best first; the first of equals wins."""
    scores, ids = naive_fine_topk(*leaves, shortlist, probes, topk, torch.float64, function, expert_bias)
    return scores, ids.long()


@pytest.fixture(params=(False, True), ids=("by-lists", "by-candidates"))
def deterministic(request) -> bool:
    """Which gradients of the top-k are made; each case has enough candidates for those by lists."""
    return request.param


@pytest.mark.parametrize(
    ("shape", "topk", "dtype"),
    [
        ((37, 33, 24, 5, 7, 1), 3, torch.float32),
        ((21, 33, 24, 4, 7, 1), 3, torch.bfloat16),
        ((21, 33, 24, 4, 7, 1), 3, torch.float16),
        ((9, 16, 50, 3, 45, 1), 45, torch.float32),
        ((9, 16, 50, 3, 20, 1), 30, torch.float32),  # more than the list
        ((1, 1, 1, 1, 1, 1), 1, torch.float32),
        ((0, 8, 12, 3, 4, 1), 2, torch.float32),
        ((21, 33, 24, 4, 7, 2), 3, torch.float32),
        ((21, 33, 24, 8, 7, 8), 20, torch.bfloat16),
        ((9, 16, 50, 5, 13, 3), 39, torch.float32),  # all
        ((9, 16, 50, 5, 13, 3), 45, torch.float32),  # more than all
        ((1, 1, 1, 1, 1, 1), 1, torch.float32),
        ((0, 8, 12, 3, 4, 2), 2, torch.float32),
        ((2, 8, 600, 9, 130, 8), 300, torch.float32),  # several tiles
    ],
    ids=str,
)
@pytest.mark.parametrize("function", (None, "sigmoid", "sqrtsoftplus"))
def test_topk_is_exact_and_the_first_of_equals_wins(shape, topk, dtype, function, kernel_device):
    leaves, shortlist, probes = make(shape, dtype, kernel_device, integers=True)
    shortlist = ascending(shortlist)
    # With a bias as large as this, equals are equal to the last bit in fp64 too.
    bias = () if function is None else (function, torch.arange(shape[2], device=kernel_device).float() % 5)
    with torch.no_grad():
        expected = naive_topk(leaves, shortlist, probes, topk, *bias)
        scores, ids = topk_kernels.fine_topk(*leaves, shortlist, probes, topk, dtype, *bias)
    assert (scores.dtype, ids.dtype) == (dtype, torch.int32)
    assert torch.equal(ids.long(), expected[1])
    assert torch.equal(scores.double(), expected[0])


@pytest.mark.parametrize("tile", (512, 32), ids=("one-tile", "merged-tiles"))
def test_the_best_of_one_tile_and_of_several(tile, monkeypatch, kernel_device):
    monkeypatch.setattr(topk_kernels, "_TILE_COLUMNS", tile)
    leaves, shortlist, probes = make((7, 8, 90, 2, 55, 1), torch.float32, kernel_device, integers=True)
    with torch.no_grad():
        leaves[0].div_(4)
        expected = naive_topk(leaves, shortlist, probes, 11)
        scores, ids = topk_kernels.fine_topk(*leaves, shortlist, probes, 11, torch.float32)
    assert torch.equal(ids.long(), expected[1])
    assert torch.equal(scores.double(), expected[0])


@pytest.mark.long  # interpreted
def test_the_largest_topk_of_a_list_of_two_full_tiles(kernel_device):
    leaves, shortlist, probes = make((2, 16, 1024, 1, 1024, 1), torch.float32, kernel_device, integers=True)
    with torch.no_grad():
        expected = naive_topk(leaves, shortlist, probes, 512)
        scores, ids = topk_kernels.fine_topk(*leaves, shortlist, probes, 512, torch.float32)
    assert torch.equal(ids.long(), expected[1])
    assert torch.equal(scores.double(), expected[0])


@pytest.mark.parametrize("num_probes", (1, 3))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_topk_gradients_equal_naive(dtype, num_probes, deterministic, kernel_device):
    leaves, shortlist, probes = make((11, 17, 40, 3, 18, num_probes), dtype, kernel_device)
    shortlist = ascending(shortlist)
    wide = widened(leaves)
    scores, ids = topk_kernels.fine_topk(*leaves, shortlist, probes, 5, torch.float32, deterministic=deterministic)
    expected_scores, expected_ids = naive_topk(wide, shortlist, probes, 5)
    assert torch.equal(ids.long(), expected_ids)
    results = []
    for found, inputs in ((scores, leaves), (expected_scores, wide)):
        loss = (found.double() * random_like(found.double()))[ids >= 0].sum()
        results.append(torch.autograd.grad(loss, inputs))
    assert_gradients_near(*results, leaves, max(5e-6, TOLERANCES[dtype]))


@pytest.mark.parametrize("num_probes", (1, 3))
@pytest.mark.parametrize("topk", (5, 60))  # 60 is more than three lists have
def test_topk_gradients_block_by_block_equal_those_of_all_tokens(num_probes, topk, monkeypatch, kernel_device):
    leaves, shortlist, probes = make((11, 17, 40, 3, 18, num_probes), torch.float32, kernel_device)
    shortlist = ascending(shortlist)
    results = []
    for size in (2**26, 4 * 18 * num_probes):  # four tokens at a time
        monkeypatch.setattr(topk_kernels, "SCORES_OF_BLOCK", size)
        scores, ids = topk_kernels.fine_topk(*leaves, shortlist, probes, topk, torch.float32)
        # A gradient that arrives where there is no candidate counts nothing.
        results.append((ids, *torch.autograd.grad(scores, leaves, random_like(scores))))
    assert torch.equal(results[0][0], results[1][0])
    for found, expected in zip(results[0][1:], results[1][1:], strict=True):
        assert found.isfinite().all() and relative_error(found, expected) <= 2e-6


@pytest.mark.parametrize(("num_probes", "into"), [(1, "grad"), (2, "main_grad")])
def test_narrow_topk_gradients_of_several_blocks_round_once(num_probes, into, monkeypatch, kernel_device):
    """A token a block: 256 and then eight times 1, which bf16 sums would lose one by one."""
    monkeypatch.setattr(topk_kernels, "SCORES_OF_BLOCK", 1)
    hidden = torch.ones(9, 4, dtype=torch.bfloat16, device=kernel_device)
    grad = torch.tensor([[256.0]] + 8 * [[1.0]], device=kernel_device)
    weight = torch.nn.Parameter(torch.ones(3, 4, dtype=torch.bfloat16, device=kernel_device))
    bias = torch.ones(3, dtype=torch.bfloat16, device=kernel_device, requires_grad=True)
    if into == "main_grad":
        weight.main_grad = torch.zeros_like(weight)
    shortlist = torch.tensor([[0, 1, 2]] * num_probes, dtype=torch.int32, device=kernel_device)
    probes = torch.arange(num_probes, device=kernel_device).expand(9, num_probes)
    scores, _ = topk_kernels.fine_topk(hidden, weight, bias, shortlist, probes, 3, torch.float32)
    scores.backward(grad.expand_as(scores))
    assert (getattr(weight, into) == 264).all() and (bias.grad == 264).all()


def test_gradients_of_rows_in_parts_equal_those_at_once(monkeypatch, kernel_device):
    leaves, shortlist, probes = make((5, 300, 24, 3, 7, 2), torch.float32, kernel_device)
    results = []
    for elements in (2**27, 128 * 10):  # three parts of 128, 128 and 44 columns
        monkeypatch.setattr(kernels, "_ROW_ELEMENTS", elements)
        scores = kernels.fine_scores(*leaves, shortlist, probes, torch.float32)
        grad = random_like(scores).masked_fill(scores.isinf(), 0.0)
        results.append(torch.autograd.grad(scores, leaves[0], grad)[0])
    assert torch.equal(*results)


def test_topk_gradients_have_equal_bits_in_every_run(kernel_device):
    leaves, shortlist, probes = make((11, 17, 40, 3, 18, 1), torch.float32, kernel_device)
    runs = []
    for _ in range(2):
        scores, ids = topk_kernels.fine_topk(*leaves, shortlist, probes, 5, torch.float32, deterministic=True)
        runs.append(torch.autograd.grad(scores[ids >= 0].square().sum(), leaves))
    assert all(torch.equal(*pair) for pair in zip(*runs, strict=True))


def test_only_the_gradients_asked_for_are_made(deterministic, kernel_device):
    leaves, shortlist, probes = make((4, 16, 24, 2, 7, 1), torch.float32, kernel_device)
    for wanted in range(3):
        inputs = [leaf.detach().requires_grad_(place == wanted) for place, leaf in enumerate(leaves)]
        scores, ids = topk_kernels.fine_topk(*inputs, shortlist, probes, 2, torch.float32, deterministic=deterministic)
        scores[ids >= 0].sum().backward()
        all_scores = kernels.fine_scores(*inputs, shortlist, probes, torch.float32)
        all_scores[all_scores.isfinite()].sum().backward()
        assert [tensor.grad is not None for tensor in inputs] == [place == wanted for place in range(3)]


def test_the_weight_gradient_of_the_topk_goes_into_main_grad(deterministic, kernel_device):
    (hidden, weight, _), shortlist, probes = make((5, 16, 60, 2, 5, 1), torch.float32, kernel_device)
    grads = []
    for fused in (False, True):
        centers = torch.nn.Parameter(weight.detach().clone())
        if fused:
            centers.main_grad = torch.full_like(centers, 3.0)
        scores, ids = topk_kernels.fine_topk(
            hidden, centers, None, shortlist, probes, 2, torch.float32, deterministic=deterministic
        )
        scores[ids >= 0].sum().backward()
        grads.append(centers.main_grad if fused else centers.grad)
    assert centers.grad_added_to_main_grad
    torch.testing.assert_close(grads[1], 3.0 + grads[0])


def test_more_than_the_kernels_take_is_not_forced(monkeypatch):
    monkeypatch.setenv("AIR_MOE_BACKEND", "triton")
    inputs, shortlist, probes = make((9, 16, 24, 3, 7, 1), torch.float32, "cpu")
    with pytest.raises(ValueError, match=r"topk \(2049\) exceeds 2048"):
        fine_topk(*inputs, shortlist, probes, 2049, torch.float32)


def test_worked_examples(kernel_device):
    hidden = torch.tensor([[1.0, 2.0]], device=kernel_device)
    weight = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]], device=kernel_device)
    inputs = (hidden, weight, None, torch.tensor([[0, 2]], device=kernel_device))
    inputs += (torch.tensor([[0]], device=kernel_device), torch.float32)
    assert kernels.fine_scores(*inputs).tolist() == [[[1.0, 3.0]]]
    scores, ids = topk_kernels.fine_topk(*inputs[:-1], 1, torch.float32)
    assert (scores.tolist(), ids.tolist()) == ([[3.0]], [[2]])


@pytest.mark.gpu
def test_scores_beyond_2_31_elements(cuda):
    num_tokens, shortlist_size = 2**20 + 64, 2048
    generator = torch.Generator(cuda).manual_seed(0)
    hidden = torch.randn(num_tokens, 16, generator=generator, device=cuda).bfloat16().requires_grad_()
    weight = torch.randn(4096, 16, generator=generator, device=cuda).bfloat16().requires_grad_()
    shortlist = torch.rand(64, 4096, generator=generator, device=cuda).argsort(dim=1)[:, :shortlist_size]
    probes = torch.randint(64, (num_tokens, 1), generator=generator, device=cuda)
    scores = kernels.fine_scores(hidden, weight, None, shortlist, probes, torch.bfloat16)
    topk_scores, topk_ids = topk_kernels.fine_topk(hidden, weight, None, shortlist, probes, 64, torch.bfloat16)
    last = slice(num_tokens - 100, num_tokens)
    wide = [leaf.detach().double() for leaf in (hidden[last], weight)]
    expected = naive_fine_scores(*wide, None, shortlist, probes[last], torch.float64)
    rounded = TOLERANCES[torch.bfloat16]
    assert relative_error(scores[last], expected) <= rounded
    assert relative_error(topk_scores[last], expected.squeeze(1).topk(64, dim=1).values) <= rounded
    chosen = (wide[0].unsqueeze(1) * wide[1][topk_ids[last].long()]).sum(dim=2)
    assert relative_error(topk_scores[last], chosen) <= rounded
    grad = torch.zeros_like(scores)
    grad[last] = random_like(grad[last])
    found = torch.autograd.grad(scores, (hidden, weight), grad)
    centers = wide[1][shortlist[probes[last].squeeze(1)]]
    expected = torch.einsum("tpl,tlh->th", grad[last].double(), centers)
    assert relative_error(found[0][last], expected) <= TOLERANCES[torch.bfloat16]
    assert found[0][: last.start].count_nonzero() == 0


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("shortlist_size", (512, 2048))
def test_large_shapes_equal_naive(shortlist_size, dtype, cuda):
    shape = (1000, 257, 4096, 48, shortlist_size, 1)
    assert_scores_equal_naive(shape, dtype, dtype, cuda)
    leaves, shortlist, probes = make(shape, dtype, cuda, integers=True)
    with torch.no_grad():
        for topk in (1, 64, 512):
            expected = naive_topk(leaves, shortlist, probes, topk)
            scores, ids = topk_kernels.fine_topk(*leaves, shortlist, probes, topk, dtype)
            assert torch.equal(ids.long(), expected[1])
            assert torch.equal(scores.double(), expected[0])
