"""Pair products: against the naive reference, gradients in fp64, order of the pairs, main_grad, odd shapes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from air_moe_megatron.ops.pair_products import eager, make_pairs, pair_dots, pair_gradients, pair_sums
from air_moe_megatron.ops.pair_products.naive import naive_pair_dots, naive_pair_sums

# Relative to the largest entry: sums in another order. bf16: the values of the sums and each result are rounded.
TOLERANCES = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 2e-2}


def make(num_rows, num_ids, per_row, hidden_size=11, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.rand(num_rows, num_ids, generator=generator).argsort(dim=1)[:, :per_row]
    rows = torch.arange(num_rows).repeat_interleave(per_row)
    ids = chosen.reshape(-1)
    if ids.numel() > 2:  # rows with unequal numbers of pairs
        keep = torch.rand(ids.numel(), generator=generator) < 0.8
        rows, ids = rows[keep], ids[keep]
    hidden = torch.randn(num_rows, hidden_size, generator=generator).to(dtype)
    weight = torch.randn(num_ids, hidden_size, generator=generator).to(dtype)
    values = torch.randn(ids.numel(), generator=generator).to(torch.promote_types(dtype, torch.float32))
    return rows, ids, hidden, weight, values


def assert_near(found, expected, dtype):
    assert found.shape == expected.shape
    scale = expected.abs().max().clamp_min(1e-30) if expected.numel() else 1.0
    assert ((found.double() - expected.double()).abs() <= TOLERANCES[dtype] * scale).all()


def gradients(out, leaves, seed=1):
    return torch.autograd.grad(out, leaves, random_like(out, seed))


def random_like(out, seed=1):
    return torch.randn(out.shape, generator=torch.Generator().manual_seed(seed)).to(out.dtype)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize(
    ("num_rows", "num_ids", "per_row"), [(1, 1, 1), (7, 5, 5), (33, 64, 9), (200, 17, 3), (3, 1000, 512), (5, 9, 0)]
)
def test_products_and_gradients_equal_naive(num_rows, num_ids, per_row, dtype):
    rows, ids, hidden, weight, values = make(num_rows, num_ids, per_row, dtype=dtype)
    pairs = make_pairs(rows, ids, num_rows, num_ids)
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    expected, found = naive_pair_dots(*wide, rows, ids), pair_dots(*leaves, pairs)
    assert_near(found, expected, dtype)
    for wanted, got in zip(gradients(expected, wide), gradients(found, leaves), strict=True):
        assert_near(got, wanted, dtype)

    leaves = [values.requires_grad_(), weight]
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    expected, found = naive_pair_sums(*wide, rows, ids, num_rows), pair_sums(*leaves, pairs)
    assert found.dtype == dtype
    assert_near(found, expected, dtype)
    for wanted, got in zip(gradients(expected, wide), gradients(found, leaves), strict=True):
        assert_near(got, wanted, dtype)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_bounded_chunks_and_gathered_rows_give_the_same(monkeypatch, dtype):
    rows, ids, hidden, weight, _ = make(40, 23, 6, dtype=dtype)
    pairs = make_pairs(rows, ids, 40, 23)
    expected = naive_pair_dots(hidden.double(), weight.double(), rows, ids)
    monkeypatch.setattr(eager, "_CHUNK_ELEMENTS", 5 * hidden.shape[1])
    assert_near(pair_dots(hidden, weight, pairs), expected, dtype)
    monkeypatch.setattr(eager, "_GATHERED_ELEMENTS", 7 * hidden.shape[1])
    wide = torch.promote_types(dtype, torch.float32)
    assert_near(eager._gathered_dots(hidden, weight, pairs, wide), expected, dtype)


@given(
    num_rows=st.integers(0, 12), num_ids=st.integers(1, 9), per_row=st.integers(0, 9), parts=st.integers(1, 5),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_split_equals_sorting_the_parts(num_rows, num_ids, per_row, parts, seed):
    rows, ids, *_ = make(num_rows, num_ids, min(per_row, num_ids), seed=seed)
    split = make_pairs(rows, ids, num_rows, num_ids).split(parts)
    part = torch.arange(parts)
    again = make_pairs(
        rows.repeat_interleave(parts), (ids.unsqueeze(1) * parts + part).flatten(), num_rows, num_ids * parts
    )
    for name in ("rows", "ids", "row_first", "by_id", "id_first"):
        assert torch.equal(getattr(split, name), getattr(again, name)), name


def test_worked_examples():
    pairs = make_pairs(torch.tensor([0, 0, 1]), torch.tensor([2, 0, 2]), 2, 3)
    assert pairs.row_first.tolist() == [0, 2, 3]
    assert pairs.by_id.tolist() == [1, 0, 2]
    assert pairs.id_first.tolist() == [0, 1, 1, 3]
    weight = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    one = make_pairs(torch.tensor([0, 0]), torch.tensor([2, 0]), 1, 3)
    assert pair_dots(torch.tensor([[1.0, 2.0]]), weight, one).tolist() == [3.0, 1.0]
    assert pair_sums(torch.tensor([2.0, 1.0]), weight, one).tolist() == [[3.0, 2.0]]


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_gradients_of_known_products_equal_naive(dtype):
    rows, ids, hidden, weight, grad = make(33, 64, 9, dtype=dtype)
    pairs = make_pairs(rows, ids, 33, 64)
    wide = [leaf.double().requires_grad_() for leaf in (hidden, weight)]
    expected = torch.autograd.grad(naive_pair_dots(*wide, rows, ids), wide, grad.double())
    found = pair_gradients(hidden, weight, pairs, grad)
    for wanted, got in zip(expected, found, strict=True):
        assert got.dtype == dtype
        assert_near(got, wanted, dtype)
    assert pair_gradients(hidden, weight, pairs, grad, need_hidden=False, need_weight=False) == (None, None)


def test_main_grad_gets_what_the_gradient_would_be_and_only_in_used_rows():
    rows, ids, hidden, weight, values = make(20, 31, 4)
    ids = ids.clamp(max=20)  # rows 21 and above are not used
    keep = torch.ones_like(ids, dtype=torch.bool)
    keep[1:] = (ids[1:] != ids[:-1]) | (rows[1:] != rows[:-1])
    rows, ids, values = rows[keep], ids[keep], values[keep]
    pairs = make_pairs(rows, ids, 20, 31)
    for out_of in (lambda w: pair_dots(hidden, w, pairs), lambda w: pair_sums(values, w, pairs)):
        plain = torch.nn.Parameter(weight.clone())
        (expected,) = gradients(out_of(plain), [plain])
        fused = torch.nn.Parameter(weight.clone().view(31, 1, -1))
        fused.main_grad = torch.full_like(weight, 3.0).view_as(fused)
        for _ in range(2):
            out = out_of(fused)
            out.backward(random_like(out))
        assert fused.grad_added_to_main_grad
        torch.testing.assert_close(fused.main_grad.view_as(weight), 3.0 + 2 * expected)
        assert (fused.main_grad[21:] == 3.0).all()


def test_gradcheck():
    rows, ids, hidden, weight, values = make(5, 6, 3, hidden_size=4, dtype=torch.float64)
    pairs = make_pairs(rows, ids, 5, 6)
    hidden, weight, values = (x.double().requires_grad_() for x in (hidden, weight, values))
    assert torch.autograd.gradcheck(lambda h, w: pair_dots(h, w, pairs), (hidden, weight))
    assert torch.autograd.gradcheck(lambda v, w: pair_sums(v, w, pairs), (values, weight))


def test_shapes_that_do_not_fit_are_refused(backend):
    rows, ids, hidden, weight, values = make(5, 6, 2)
    pairs = make_pairs(rows, ids, 5, 6)
    with pytest.raises(ValueError, match=r"must both be \[N\]"):
        make_pairs(rows, ids[:-1], 5, 6)
    with pytest.raises(ValueError, match=r"R = 5"):
        pair_dots(hidden[:-1], weight, pairs)
    with pytest.raises(ValueError, match="V = 6"):
        pair_dots(hidden, weight[:-1], pairs)
    with pytest.raises(ValueError, match="same last dimension"):
        pair_dots(hidden[:, 1:], weight, pairs)
    with pytest.raises(ValueError, match=r"\[N\] with N"):
        pair_sums(values[:-1], weight, pairs)
    with pytest.raises(ValueError, match=r"\[N\] with N"):
        pair_gradients(hidden, weight, pairs, values[:-1])
