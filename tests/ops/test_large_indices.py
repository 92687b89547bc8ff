"""Tensors of more than 2^31 elements: what kernels reach beyond equals a reference. Small ones run interpreted."""

import pytest
import torch

from air_moe_megatron.ops.coarse.kernels import assign_with_statistics
from air_moe_megatron.ops.fine_scores.kernels import fine_scores
from air_moe_megatron.ops.fine_scores.topk_kernels import fine_topk
from air_moe_megatron.ops.pair_products import make_pairs
from air_moe_megatron.ops.pair_products.kernels import (
    launch_pair_weight_gradient,
    pair_dots,
    pair_sums,
)
from tests.ops.conftest import relative_error

BF16 = 2.0**-7  # a rounding of 8 bits
SMALL, LARGE = (133, 32), (2**20 + 5, 2048)  # rows, columns; the large ones are 4 GiB in bf16


def random_rows(num_rows, hidden_size, rows, device):
    """[num_rows, H] bf16 of zeros but in the given rows."""
    tensor = torch.zeros(num_rows, hidden_size, dtype=torch.bfloat16, device=device)
    generator = torch.Generator().manual_seed(0)
    tensor[rows] = torch.randn(len(rows), hidden_size, generator=generator).to(device).bfloat16()
    return tensor


def pair_products_of_many_rows(num_rows, hidden_size, device):
    """Up to four GiB each of tokens, sums and gradients of the tokens."""
    rows = torch.tensor([0, 3, num_rows - 2, num_rows - 1, num_rows - 1], device=device)
    ids = torch.tensor([1, 0, 2, 2, 0], device=device)
    hidden = random_rows(num_rows, hidden_size, rows.unique(), device).requires_grad_()
    weight = random_rows(3, hidden_size, torch.arange(3, device=device), device)
    pairs = make_pairs(rows, ids, num_rows, 3)
    wide, wide_weight = hidden.detach()[rows].double(), weight[ids].double()
    dots = pair_dots(hidden, weight, pairs)
    assert relative_error(dots, (wide * wide_weight).sum(dim=1)) <= 1e-5
    values = torch.tensor([1.0, -2.0, 3.0, 0.5, 0.25], device=device)
    expected = torch.zeros(2, hidden_size, dtype=torch.float64, device=device)
    expected.index_add_(0, rows[2:] - (num_rows - 2), values[2:, None].double() * wide_weight[2:])
    for sums in (pair_sums(values, weight, pairs), torch.autograd.grad(dots, hidden, values)[0]):
        assert relative_error(sums[-2:], expected) <= BF16
        assert sums[4:-2].count_nonzero() == 0
        del sums
    grad_weight = torch.zeros(3, hidden_size, device=device)
    launch_pair_weight_gradient(hidden.detach(), values, pairs, grad_weight)
    expected = torch.zeros_like(grad_weight, dtype=torch.float64).index_add_(0, ids, values[:, None].double() * wide)
    assert relative_error(grad_weight, expected) <= 1e-5


def fine_scores_of_many_rows(num_rows, hidden_size, device):
    """As many tokens as experts; only the last of either are not zero."""
    last = torch.arange(num_rows - 16, num_rows, device=device)
    hidden = random_rows(num_rows, hidden_size, last, device).requires_grad_()
    weight = random_rows(num_rows, hidden_size, last, device).requires_grad_()
    shortlist = torch.stack((torch.arange(16, device=device), last))  # the first experts, the last experts
    probes = (torch.arange(num_rows, device=device) >= num_rows - 16).long().unsqueeze(1)
    scores = fine_scores(hidden, weight, None, shortlist, probes, torch.float32)
    best, ids = fine_topk(hidden, weight, None, shortlist, probes, 4, torch.float32)
    merged = fine_topk(hidden, weight, None, shortlist, torch.cat((probes, 1 - probes), dim=1), 4, torch.float32)
    wide_hidden, wide_weight = hidden.detach()[-16:].double(), weight.detach()[-16:].double()
    expected = wide_hidden @ wide_weight.t()
    assert relative_error(scores[-16:, 0], expected) <= 1e-5
    assert scores[:-16].count_nonzero() == 0
    wanted = expected.topk(4, dim=1)
    assert relative_error(best[-16:], wanted.values) <= 1e-5
    assert torch.equal(ids[-16:].long(), wanted.indices + num_rows - 16)
    above = wanted.values.clamp(min=0)  # the experts of the other list score zero
    assert relative_error(merged[0][-16:], above) <= 1e-5
    assert torch.equal(merged[1][-16:].long()[above > 0], ids[-16:].long()[above > 0])

    grad = torch.zeros_like(scores)
    grad[-16:, 0] = torch.randn(16, 16, generator=torch.Generator().manual_seed(1)).to(device)
    wide_grad = grad[-16:, 0].double()
    for output, output_grad, expected_grad in (
        (scores, grad, wide_grad),
        (best, grad[:, 0, :4], torch.zeros_like(expected).scatter_(1, wanted.indices, wide_grad[:, :4])),
    ):
        of_hidden, of_weight = torch.autograd.grad(output, (hidden, weight), output_grad)
        assert relative_error(of_hidden[-16:], expected_grad @ wide_weight) <= BF16
        assert relative_error(of_weight[-16:], expected_grad.t() @ wide_hidden) <= BF16
        assert of_hidden[:-16].count_nonzero() == 0 and of_weight[:-16].count_nonzero() == 0
        del of_hidden, of_weight


def coarse_of_many_codewords(num_rows, hidden_size, device):
    """About 45 GiB at once: the codewords are fp32, and their three summands and the statistics lie beside them."""
    codewords = torch.zeros(num_rows, hidden_size, device=device)
    codewords[:, 0] = -1.0  # all others point away
    chosen = torch.tensor([0, 5, num_rows - 3, num_rows - 1], device=device)
    rows = torch.randn(4, hidden_size, generator=torch.Generator().manual_seed(2)).to(device)
    codewords[chosen] = torch.nn.functional.normalize(rows, dim=1)
    codewords[chosen, 0] = codewords[chosen, 0].abs()
    hidden = (3.0 * codewords[chosen]).bfloat16()
    for deterministic in (False, True):
        probes, statistics = assign_with_statistics(hidden, codewords, 1, deterministic=deterministic)
        assert torch.equal(probes[:, 0], chosen)
        unit = torch.nn.functional.normalize(hidden.double(), dim=1)
        assert relative_error(statistics[chosen, :hidden_size], unit) <= 1e-5
        assert statistics[:, hidden_size].sum() == 4 and (statistics[chosen, hidden_size] == 1).all()
        assert statistics[6 : num_rows - 3].count_nonzero() == 0
        del statistics


CASES = {
    "pair-products": pair_products_of_many_rows,
    "fine-scores": fine_scores_of_many_rows,
    "coarse": coarse_of_many_codewords,
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_few_rows(case, kernel_device):
    case(*SMALL, kernel_device)


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_beyond_2_31_elements(case, cuda):
    case(*LARGE, cuda)
