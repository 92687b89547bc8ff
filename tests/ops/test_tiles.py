"""Parts that kernels share: keys, products in two parts, blocks of segments, summands of codewords."""

import math

import pytest
import torch
import triton
import triton.language as tl

from air_moe_megatron.ops.blocks import block_of, block_rows_of
from air_moe_megatron.ops.segments import sort_into_segments
from air_moe_megatron.ops.tiles import (
    dot_wide,
    id_of_key,
    ids_of_keys,
    order_key,
    segment_blocks,
    split_codewords,
    value_of_key,
)
from tests.ops.conftest import relative_error

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@triton.jit
def _keys_kernel(values, ids, keys, read_values, read_ids, N: tl.constexpr):
    positions = tl.arange(0, N)
    key = order_key(tl.load(values + positions), tl.load(ids + positions))
    tl.store(keys + positions, key)
    tl.store(read_values + positions, value_of_key(key))
    tl.store(read_ids + positions, id_of_key(key))


def test_keys_order_values_then_ids_and_can_be_read(kernel_device):
    inf, nan = math.inf, math.nan
    values = [nan, inf, 3.0e38, 1.5, 1e-40, 0.0, -0.0, -1e-40, -1.5, -3.0e38, -inf, -nan, 1.5, 1.5, 0.0, nan]
    ids = [5, 0, 2**31 - 1, 4, 0, 1, 2, 0, 9, 7, 2**31 - 1, 6, 5, 2**31 - 1, 3, 7]
    values = torch.tensor(values, device=kernel_device)
    ids = torch.tensor(ids, dtype=torch.int32, device=kernel_device)
    keys, read_ids = (torch.empty(16, dtype=torch.int64, device=kernel_device) for _ in range(2))
    read_values = torch.empty_like(values)
    _keys_kernel[(1,)](values, ids, keys, read_values, read_ids, N=16)
    assert torch.equal(read_ids, ids.long()) and torch.equal(ids_of_keys(keys), ids.long())
    torch.testing.assert_close(read_values, values, rtol=0, atol=0, equal_nan=True)
    expected = sorted(range(16), key=lambda n: (-inf if values[n].isnan() else -values[n].item(), ids[n].item()))
    # NaN is as high as can be, above infinity.
    expected = [n for n in expected if values[n].isnan()] + [n for n in expected if not values[n].isnan()]
    assert keys.argsort(descending=True).tolist() == expected
    assert (keys > -(2**63)).all()


@triton.jit
def _dot_wide_kernel(a, b, out, DOT_DTYPE: tl.constexpr):
    positions = tl.arange(0, 16)
    where = positions[:, None] * 16 + positions[None, :]
    product = dot_wide(tl.load(a + where), tl.load(b + where), tl.zeros([16, 16], tl.float32), DOT_DTYPE)
    tl.store(out + where, product)


@pytest.mark.parametrize(
    "dtype, dot_dtype, tolerance",
    [(torch.float32, tl.float32, 1e-6), (torch.bfloat16, tl.bfloat16, 2.0**-16), (torch.float16, tl.float16, 2.0**-15)],
    ids=("fp32", "bf16", "fp16"),
)
def test_products_of_fp32_and_16_bit_numbers_keep_16_bits(dtype, dot_dtype, tolerance, kernel_device):
    """Also of numbers beyond fp16's range. The interpreter rounds the parts towards zero, which costs a bit."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(16, 16, generator=generator) for _ in range(2))
    a, b = a.mul(1e8).to(kernel_device), b.to(dtype).to(kernel_device)
    out = torch.empty(16, 16, device=kernel_device)
    _dot_wide_kernel[(1,)](a, b, out, DOT_DTYPE=dot_dtype)
    assert relative_error(out, a.double() @ b.double()) <= tolerance


def test_blocks_of_segments(kernel_device):
    segments, starts = segment_blocks(torch.tensor([0, 3, 3, 4], device=kernel_device), 4, 2)
    assert (segments.tolist(), starts.tolist()) == ([0, 0, 2], [0, 2, 3])
    first = torch.tensor([2, 2, 9, 10, 10], device=kernel_device)  # the items before the first segment are in none
    segments, starts = segment_blocks(first, 10, 4)
    assert (segments.tolist()[:3], starts.tolist()[:3]) == ([1, 1, 2], [2, 6, 9])
    assert set(segments.tolist()[3:]) == {4}
    assert segment_blocks(first, 10, 10)[0].tolist() == [1, 2, 4, 4]
    assert segment_blocks(torch.tensor([0, 0], device=kernel_device), 0, 4)[0].tolist() == []


@pytest.mark.parametrize("block_size", (1, 3, 16))
def test_blocks_cover_every_item_once(block_size, kernel_device):
    generator = torch.Generator().manual_seed(block_size)
    for _ in range(20):
        counts = torch.randint(0, 9, (6,), generator=generator) * (torch.rand(6, generator=generator) < 0.6)
        first = torch.cat((torch.zeros(1, dtype=torch.int64), counts.cumsum(0)))
        segments, starts = segment_blocks(first.to(kernel_device), int(first[-1]), block_size)
        items = []
        for segment, start in zip(segments.tolist(), starts.tolist(), strict=True):
            if segment < 6:
                items += range(start, min(start + block_size, int(first[segment + 1])))
        assert items == list(range(int(first[-1])))


def test_items_are_sorted_into_segments():
    order, first = sort_into_segments(torch.tensor([1, 0, 1]), 2)
    assert (order.tolist(), first.tolist()) == ([1, 0, 2], [0, 1, 3])
    order, first = sort_into_segments(torch.tensor([3, 0, 3, 2, 0]), 3)  # segment 1 is empty, and 3 is none
    assert (order.tolist(), first.tolist()) == ([1, 4, 3, 0, 2], [0, 2, 2, 3])


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_summands_add_up_to_the_codewords(dtype):
    codewords = torch.nn.functional.normalize(torch.randn(50, 200, generator=torch.Generator().manual_seed(0)), dim=1)
    codewords[0] = 0.0
    codewords[0, 0] = -1.0
    summands, scale = split_codewords(codewords, dtype)
    assert summands.dtype == dtype and summands.shape == (3, 50, 200)
    error = summands.double().sum(dim=0) / scale - codewords.double()
    assert error.abs().max() <= (0.0 if dtype == torch.bfloat16 else 2.0**-38)


def test_worked_examples():
    summands, scale = split_codewords(torch.tensor([[1 + 2.0**-9]]), torch.bfloat16)
    assert summands.flatten().tolist() == [1, 2.0**-9, 0] and scale == 1.0
    assert [block_of(size, 64) for size in (0, 1, 17, 64, 65)] == [16, 16, 32, 64, 64]
    assert [block_rows_of(*sizes) for sizes in ((0, 5), (100, 2), (1000, 2), (3, 1000))] == [16, 64, 64, 16]
