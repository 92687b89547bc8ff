"""Coarse assignment and statistics: kernels against naive.py."""

import math

import pytest
import torch

from air_moe_megatron.ops import coarse
from air_moe_megatron.ops.coarse import kernels
from air_moe_megatron.ops.coarse.naive import naive_assign, naive_assign_with_statistics, naive_token_statistics
from tests.ops.conftest import relative_error

# The interpreter's numpy warns of the products and quotients of tokens that are not finite.
pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Root mean square of the difference over that of the reference, which is naive.py in fp64 on the same rounded tokens:
# all arithmetic is in fp32, whatever the tokens' dtype.
TOLERANCE = 2e-6
# T, H, C, P
SHAPES = {
    "odd-sizes": (21, 33, 150, 3),
    "one-probe": (70, 40, 19, 1),
    "most-probes": (37, 33, 9, 8),
    "every-codeword": (5, 16, 4, 4),
    "no-tokens": (0, 33, 5, 2),
    "one-token": (1, 7, 3, 2),
    "one-everything": (1, 1, 1, 1),
}


def make_inputs(shape, dtype, device, seed=0):
    num_tokens, hidden_size, num_clusters, _ = shape
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(num_tokens, hidden_size, generator=generator).to(dtype)
    codewords = torch.nn.functional.normalize(torch.randn(num_clusters, hidden_size, generator=generator), dim=1)
    return hidden.to(device), codewords.to(device)


def assert_statistics(statistics, expected):
    """Each column group by itself: counts are exact, and larger than the rest."""
    assert statistics.dtype == torch.float32 and statistics.shape == expected.shape
    hidden_size = statistics.shape[1] - 3
    assert torch.equal(statistics[:, hidden_size].double(), expected[:, hidden_size].double())
    for columns in (slice(0, hidden_size), slice(hidden_size + 1, hidden_size + 2), slice(hidden_size + 2, None)):
        assert relative_error(statistics[:, columns], expected[:, columns].double()) <= TOLERANCE


def assert_equals_naive(shape, dtype, device):
    hidden, codewords = make_inputs(shape, dtype, device)
    probes, statistics = kernels.assign_with_statistics(hidden, codewords, shape[3])
    expected, expected_statistics = naive_assign_with_statistics(hidden, codewords.double(), shape[3])
    assert probes.dtype == torch.int64
    assert torch.equal(probes, expected)
    assert_statistics(statistics, expected_statistics)
    assert_statistics(kernels.token_statistics(hidden, codewords, probes[:, 0]), expected_statistics)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_equals_naive(shape, kernel_device):
    assert_equals_naive(shape, torch.float32, kernel_device)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("shape", ("odd-sizes", "no-tokens"))
def test_narrow_dtypes_equal_naive(shape, dtype, kernel_device):
    assert_equals_naive(SHAPES[shape], dtype, kernel_device)


@pytest.mark.parametrize("deterministic", (False, True), ids=("atomic", "sorted"))
def test_masks_of_codewords_and_tokens(deterministic, kernel_device):
    """Both are columns of wider masks: what is read has to be made contiguous."""
    hidden, codewords = make_inputs((21, 33, 150, 3), torch.float32, kernel_device)
    generator = torch.Generator().manual_seed(1)
    allowed = (torch.rand(150, 2, generator=generator) < 0.1).to(kernel_device)[:, 0]
    padding_mask = (torch.rand(21, 2, generator=generator) < 0.5).to(kernel_device)[:, 1]
    probes, statistics = kernels.assign_with_statistics(hidden, codewords, 3, allowed, padding_mask, deterministic)
    expected, expected_statistics = naive_assign_with_statistics(hidden, codewords.double(), 3, allowed, padding_mask)
    assert torch.equal(probes, expected)
    assert allowed[probes].all()
    assert_statistics(statistics, expected_statistics)
    all_padding = torch.ones_like(padding_mask)
    assert not kernels.assign_with_statistics(hidden, codewords, 1, None, all_padding, deterministic)[1].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_lower_codeword_wins_a_tie(dtype, kernel_device):
    """Small integers, whose products are exact, over two blocks of codewords; positive and negative zeros are equal."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randint(-1, 2, (37, 5), generator=generator).to(dtype).to(kernel_device)
    codewords = torch.randint(-1, 2, (200, 5), generator=generator).float().to(kernel_device)
    probes = kernels.assign(hidden, codewords, 8)
    assert torch.equal(probes, naive_assign(hidden, codewords, 8))


@pytest.mark.parametrize("deterministic", (False, True), ids=("atomic", "sorted"))
@pytest.mark.parametrize(
    "value, dtype",
    [(math.nan, torch.float32), (-math.nan, torch.float32), (-math.inf, torch.float32), (math.nan, torch.bfloat16)],
    ids=("nan", "minus-nan", "minus-inf", "bf16-nan"),
)
def test_a_token_that_is_not_finite_spoils_its_codeword_only(value, dtype, deterministic, kernel_device):
    hidden, codewords = make_inputs((9, 33, 6, 2), dtype, kernel_device)
    hidden[4, 5] = value
    probes, statistics = kernels.assign_with_statistics(hidden, codewords, 2, deterministic=deterministic)
    assert ((probes >= 0) & (probes < 6)).all() and (probes[:, 0] != probes[:, 1]).all()
    others = torch.arange(9, device=kernel_device) != 4
    assert torch.equal(probes[others], naive_assign(hidden[others], codewords.double(), 2))
    is_finite = statistics.isfinite().all(dim=1)
    assert not is_finite[probes[4, 0]]
    assert is_finite.sum() == 5
    # Padding does not count, whatever it holds.
    _, statistics = kernels.assign_with_statistics(
        hidden, codewords, 2, padding_mask=~others, deterministic=deterministic
    )
    assert statistics.isfinite().all()


@pytest.mark.parametrize("deterministic", (False, True), ids=("atomic", "sorted"))
def test_every_token_on_one_codeword_and_tokens_of_length_zero(deterministic, kernel_device):
    hidden, codewords = make_inputs((70, 17, 5, 1), torch.float32, kernel_device)
    hidden[3] = 0.0
    allowed = torch.arange(5, device=kernel_device) == 2
    probes, statistics = kernels.assign_with_statistics(hidden, codewords, 1, allowed, deterministic=deterministic)
    assert (probes == 2).all()
    expected = naive_token_statistics(hidden, codewords.double(), probes[:, 0])
    assert_statistics(statistics, expected)
    assert not statistics[[0, 1, 3, 4]].any()


def test_fewer_codewords_allowed_than_probes(kernel_device):
    hidden, codewords = make_inputs((5, 33, 6, 3), torch.float32, kernel_device)
    allowed = torch.arange(6, device=kernel_device) == 4
    assert kernels.assign(hidden, codewords, 3, allowed).tolist() == [[4, 0, 1]] * 5


def test_sorted_statistics_of_a_fixed_assignment_have_equal_bits_in_every_run(kernel_device):
    hidden, codewords = make_inputs((26, 300, 4, 1), torch.bfloat16, kernel_device)
    nearest = torch.arange(26, device=kernel_device).square() % 4
    runs = [kernels.token_statistics(hidden, codewords, nearest) for _ in range(2)]
    assert torch.equal(*runs)
    assert_statistics(runs[0], naive_token_statistics(hidden, codewords.double(), nearest))
    assert not runs[0][[2, 3]].any()


def test_strided_inputs_equal_contiguous_ones(kernel_device):
    hidden, codewords = make_inputs((33, 37, 6, 2), torch.float32, kernel_device)
    expected = kernels.assign_with_statistics(hidden, codewords, 2, deterministic=True)
    columns = kernels.assign_with_statistics(
        hidden.t().contiguous().t(), codewords.t().contiguous().t(), 2, deterministic=True
    )
    assert all(torch.equal(*pair) for pair in zip(expected, columns, strict=True))


def test_worked_examples(kernel_device):
    hidden = torch.tensor([[0.0, 2.0]], device=kernel_device)
    codewords = torch.eye(2, device=kernel_device)
    for deterministic in (False, True):
        probes, statistics = kernels.assign_with_statistics(hidden, codewords, 1, deterministic=deterministic)
        assert probes.tolist() == [[1]]
        assert statistics.tolist() == [[0, 0, 0, 0, 0], [0, 1, 1, 1, 2]]


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda inputs: inputs | {"hidden": torch.zeros(3, 5)}, "same H"),
        (lambda inputs: inputs | {"codewords": torch.zeros(6, 4).bfloat16()}, "codewords"),
        (lambda inputs: inputs | {"num_probes": 0}, "num_probes"),
        (lambda inputs: inputs | {"num_probes": 7}, "C = 6"),
        (lambda inputs: inputs | {"allowed": torch.ones(5, dtype=torch.bool)}, r"allowed \(5,\)"),
        (lambda inputs: inputs | {"padding_mask": torch.ones(3)}, "padding_mask"),
    ],
    ids=["hidden", "codewords", "no-probe", "probes", "allowed", "padding"],
)
def test_what_does_not_fit_is_refused(change, message, backend):
    inputs = {"hidden": torch.zeros(3, 4), "codewords": torch.zeros(6, 4), "num_probes": 2}
    with pytest.raises(ValueError, match=message):
        coarse.assign_with_statistics(**change(inputs))
    with pytest.raises(ValueError, match=r"\[T\] with T = 3"):
        coarse.token_statistics(inputs["hidden"], inputs["codewords"], torch.zeros(2, dtype=torch.int64))


@pytest.mark.gpu
@pytest.mark.parametrize("deterministic", (False, True), ids=("atomic", "sorted"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large(dtype, deterministic, cuda):
    """Similarities equal to those of the reference's choice: with so many tokens, some near ties fall otherwise."""
    hidden, codewords = make_inputs((16384, 2048, 1024, 2), dtype, cuda)
    probes, statistics = kernels.assign_with_statistics(hidden, codewords, 2, deterministic=deterministic)
    similarity = hidden.double() @ codewords.double().t()
    best = similarity.topk(2, dim=1).values
    torch.testing.assert_close(similarity.gather(1, probes), best, rtol=0, atol=1e-4)
    assert_statistics(statistics, naive_token_statistics(hidden, codewords.double(), probes[:, 0]))


@pytest.mark.gpu
@pytest.mark.parametrize("deterministic", (False, True), ids=("atomic", "sorted"))
def test_tokens_beyond_2_31_elements(deterministic, cuda):
    num_tokens, hidden_size = 2**20 + 5, 2048
    codewords = make_inputs((0, hidden_size, 8, 1), torch.float32, cuda)[1]
    chosen = torch.arange(num_tokens, device=cuda) % 8
    hidden = codewords.bfloat16()[chosen]
    probes, statistics = kernels.assign_with_statistics(hidden, codewords, 1, deterministic=deterministic)
    assert torch.equal(probes[:, 0], chosen)
    assert torch.equal(statistics[:, hidden_size], chosen.bincount(minlength=8).float())
    assert (statistics[:, hidden_size + 1] / statistics[:, hidden_size] > 0.99).all()
