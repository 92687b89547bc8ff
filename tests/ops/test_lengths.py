"""Tokens of every finite length: unit vectors, probes and statistics of the coarse stage against fp64."""

import math

import pytest
import torch

from air_moe_megatron.ops.coarse import eager as eager_coarse
from air_moe_megatron.ops.coarse import kernels
from air_moe_megatron.ops.coarse.naive import naive_assign, naive_token_statistics
from air_moe_megatron.ops.unit_vectors import LONGEST, scale_rows, unit_rows

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning"),
]

# From denormal numbers to nearly the largest; the last overflows fp32 as a length, though every entry is finite.
LENGTHS = (1e-45, 1e-40, 1e-37, 1e-25, 1e-12, 1.0, 1e12, 1e20, 1e30, 1e38, 8e38)


def eager(hidden, codewords, num_probes, padding_mask=None):
    return eager_coarse.assign_with_statistics(hidden, codewords, num_probes, None, padding_mask)


def atomic(hidden, codewords, num_probes, padding_mask=None):
    return kernels.assign_with_statistics(hidden, codewords, num_probes, padding_mask=padding_mask)


def ordered(hidden, codewords, num_probes, padding_mask=None):
    return kernels.assign_with_statistics(hidden, codewords, num_probes, padding_mask=padding_mask, deterministic=True)


WAYS = pytest.mark.parametrize("way", (eager, atomic, ordered), ids=lambda way: way.__name__)
DTYPES = pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)


def tokens_of_lengths(lengths, device, dtype=torch.float32, seed=0):
    """Tokens [n, 24] of the given lengths around one direction, some of whose entries are zero.

    Of length 1e-45, the smallest number of all, there are only vectors along the axes.
    """
    generator = torch.Generator().manual_seed(seed)
    directions = torch.ones(24) + 0.3 * torch.randn(len(lengths), 24, generator=generator)
    directions[:, ::5] = 0.0
    directions = torch.nn.functional.normalize(directions.double(), dim=1)
    lengths = torch.tensor(lengths, dtype=torch.float64).unsqueeze(1)
    directions[lengths[:, 0] < 1e-44] = torch.eye(24, dtype=torch.float64)[1]
    if dtype != torch.float32:  # to the ends of their ranges; Triton's interpreter misreads denormal bf16
        lengths = lengths.clamp(*((1e-6, 6e4) if dtype == torch.float16 else (1e-36, 8e38)))
    return (lengths * directions).to(dtype).to(device)


def codewords_around(device, seed=0):
    """[9, 24] fp32: the tokens are nearest to the first."""
    codewords = torch.randn(9, 24, generator=torch.Generator().manual_seed(seed))
    codewords[:, 1] *= 0.1
    codewords[0] = 1.0
    return torch.nn.functional.normalize(codewords, dim=1).to(device)


def cosine(a, b):
    return torch.nn.functional.cosine_similarity(a.double(), b.double(), dim=-1)


def assert_statistics_near(statistics, expected):
    assert torch.equal(statistics[:, 24].double(), expected[:, 24])
    torch.testing.assert_close(statistics.double(), expected, rtol=3e-6, atol=1e-6)


@DTYPES
@pytest.mark.parametrize("length", LENGTHS)
def test_unit_rows_are_exact_for_every_finite_length(length, dtype):
    rows = tokens_of_lengths([length] * 5, "cpu", dtype)
    expected = torch.nn.functional.normalize(rows.double(), dim=1, eps=0.0)
    found = unit_rows(rows)
    assert rows.isfinite().all() and found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected.nan_to_num(), rtol=1e-6, atol=1e-7)


def test_scales_are_one_for_ordinary_rows_and_leave_their_bits_alone():
    rows = tokens_of_lengths([1e-15, 1.0, 1e14], "cpu")
    scaled, scale = scale_rows(rows)
    assert (scale == 1.0).all() and torch.equal(scaled, rows)
    assert torch.equal(unit_rows(rows), rows / rows.norm(dim=1, keepdim=True))


def test_worked_examples():
    torch.testing.assert_close(unit_rows(torch.tensor([[3e-30, 4e-30], [0, 0]])), torch.tensor([[0.6, 0.8], [0, 0]]))
    denormal = torch.tensor([[3, 4]], dtype=torch.int16).view(torch.bfloat16)
    torch.testing.assert_close(unit_rows(denormal), torch.tensor([[0.6, 0.8]]))
    scaled, scale = scale_rows(torch.tensor([[1e-30, 0.0]]))
    assert scale.item() == 2.0**100 and scaled[0, 0].item() == pytest.approx(1.2677, abs=1e-4)


@pytest.mark.parametrize("value", (math.nan, math.inf, -math.inf), ids=str)
def test_unit_rows_tell_of_what_is_not_finite(value):
    rows = tokens_of_lengths([1.0, 1e38], "cpu")
    rows[1, 3] = value
    assert unit_rows(rows).isfinite().all(dim=1).tolist() == [True, False]


@WAYS
@DTYPES
@pytest.mark.parametrize("length", LENGTHS)
def test_one_such_token_among_ordinary_ones(length, dtype, way, kernel_device):
    hidden = tokens_of_lengths([1.0] * 11 + [length] + [1.0] * 8, kernel_device, dtype)
    codewords = codewords_around(kernel_device)
    probes, statistics = way(hidden, codewords, 2)
    assert torch.equal(probes, naive_assign(hidden, codewords.double(), 2))
    expected = naive_token_statistics(hidden, codewords.double(), probes[:, 0])
    assert_statistics_near(statistics, expected)
    assert cosine(statistics[0, :24], expected[0, :24]) > 1 - 1e-6


@WAYS
@DTYPES
def test_all_lengths_in_one_cluster(dtype, way, kernel_device):
    hidden = tokens_of_lengths(LENGTHS * 4, kernel_device, dtype)
    codewords = codewords_around(kernel_device)
    probes, statistics = way(hidden, codewords, 1)
    assert (probes == 0).all()
    expected = naive_token_statistics(hidden, codewords.double(), probes[:, 0])
    assert expected[0, 24] == len(hidden)
    assert_statistics_near(statistics, expected)
    assert cosine(statistics[0, :24], expected[0, :24]) > 1 - 1e-6


@WAYS
def test_the_sum_of_lengths_stays_finite_and_is_exact_below_the_longest(way, kernel_device):
    codewords = codewords_around(kernel_device)
    hidden = tokens_of_lengths([8e38] * 50, kernel_device)
    assert way(hidden, codewords, 1)[1][0, 26].item() == 50 * LONGEST
    hidden = tokens_of_lengths([1e28] * 50, kernel_device)
    assert way(hidden, codewords, 1)[1][0, 26].item() == pytest.approx(50 * 1e28, rel=1e-5)


@WAYS
@DTYPES
def test_tokens_of_zeros_count_nothing(dtype, way, kernel_device):
    hidden = tokens_of_lengths([1.0] * 7, kernel_device, dtype)
    codewords = codewords_around(kernel_device)
    expected = way(hidden[1:6], codewords, 1)[1]
    hidden[[0, 6]] = 0.0
    probes, statistics = way(hidden, codewords, 1)
    assert ((probes >= 0) & (probes < 9)).all()
    assert statistics[:, 24].sum() == 5
    torch.testing.assert_close(statistics, expected)
    assert not way(torch.zeros_like(hidden), codewords, 1)[1].any()


@WAYS
@pytest.mark.parametrize("value", (math.nan, math.inf, -math.inf), ids=str)
@pytest.mark.parametrize("length", (1e-30, 1.0, 1e38))
def test_tokens_that_are_not_finite_are_found_whatever_their_length(length, value, way, kernel_device):
    hidden = tokens_of_lengths([1.0, length, 1.0], kernel_device)
    hidden[1, 4] = value
    codewords = codewords_around(kernel_device)
    probes, statistics = way(hidden, codewords, 1)
    assert not statistics[probes[1, 0]].isfinite().all()
    padding_mask = torch.tensor([False, True, False], device=kernel_device)
    assert way(hidden, codewords, 1, padding_mask)[1].isfinite().all()
