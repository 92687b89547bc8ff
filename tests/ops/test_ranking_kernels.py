"""Ranking of the experts at each codeword: kernels against naive.py."""

import math

import pytest
import torch

from air_moe_megatron.ops.ranking import kernel_bytes, kernels, rank_experts
from air_moe_megatron.ops.ranking.naive import naive_rank_experts, naive_scores
from tests.ops.conftest import relative_error

pytestmark = pytest.mark.usefixtures("poisoned_memory")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Of the scores, as the root mean square of the difference over that of the reference, which is naive.py in fp64 on the
# same rounded weights: all arithmetic is in fp32, whatever their dtype.
TOLERANCE = 2e-6
# C, H, E, L
SHAPES = {
    "odd-sizes": (11, 33, 201, 5),
    "several-tiles-of-codewords": (140, 20, 70, 2),
    "list-longer-than-groups": (9, 33, 100, 37),
    "every-expert": (5, 16, 40, 40),
    "fewer-experts-than-a-group": (3, 17, 5, 2),
    "one-everything": (1, 1, 1, 1),
}
# Whether with bias, score function
RANKED_BY = {
    "scores": (False, None),
    "bias": (True, None),
    "sigmoid": (False, "sigmoid"),
    "sqrtsoftplus": (True, "sqrtsoftplus"),
}


def make_inputs(shape, dtype, ranked_by, device, seed=0):
    num_clusters, hidden_size, num_experts, shortlist_size = shape
    with_bias, score_function = ranked_by
    generator = torch.Generator().manual_seed(seed)

    def randn(*size):
        return torch.randn(*size, generator=generator)

    codewords = torch.nn.functional.normalize(randn(num_clusters, hidden_size), dim=1).to(device)
    scale, weight = 0.5 + randn(num_clusters).abs().to(device), randn(num_experts, hidden_size).to(dtype).to(device)
    bias = randn(num_experts).to(dtype).to(device) if with_bias else None
    expert_bias = randn(num_experts).to(device) if score_function else None
    return codewords, scale, weight, bias, shortlist_size, score_function, expert_bias


def in_fp64(inputs):
    return tuple(x.double() if torch.is_tensor(x) else x for x in inputs)


def assert_equals_naive(inputs, **options):
    lists, nearest, score = kernels.rank_experts(*inputs, **options)
    expected_lists, expected_nearest, expected_score = naive_rank_experts(*in_fp64(inputs))
    assert (lists.dtype, nearest.dtype, score.dtype) == (torch.int64, torch.int64, torch.float32)
    assert torch.equal(lists, expected_lists)
    assert torch.equal(nearest, expected_nearest)
    assert relative_error(score, expected_score) <= TOLERANCE


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_equals_naive(shape, kernel_device):
    assert_equals_naive(make_inputs(shape, torch.float32, RANKED_BY["sqrtsoftplus"], kernel_device))


@pytest.mark.parametrize("ranked_by", ("scores", "sqrtsoftplus"))
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_narrow_dtypes_equal_naive(dtype, ranked_by, kernel_device):
    assert_equals_naive(make_inputs(SHAPES["odd-sizes"], dtype, RANKED_BY[ranked_by], kernel_device))


@pytest.mark.parametrize("ranked_by", ("scores", "bias", "sigmoid"))
def test_ranked_by_other_scores(ranked_by, kernel_device):
    assert_equals_naive(make_inputs(SHAPES["odd-sizes"], torch.float32, RANKED_BY[ranked_by], kernel_device))


def test_strided_biases_equal_contiguous_ones(kernel_device):
    *inputs, bias, size, function, expert_bias = make_inputs(
        SHAPES["every-expert"], torch.float32, RANKED_BY["sqrtsoftplus"], kernel_device
    )
    strided = (values.unsqueeze(1).repeat(1, 3)[:, 1] for values in (bias, expert_bias))
    assert_equals_naive((*inputs, next(strided), size, function, next(strided)))


@pytest.mark.parametrize(
    "dtype, group_size",
    [(torch.float32, 16), (torch.float32, 64), (torch.float32, 128), (torch.bfloat16, 128)],
    ids=str,
)
def test_groups_of_any_size(dtype, group_size, kernel_device):
    inputs = make_inputs(SHAPES["odd-sizes"], dtype, RANKED_BY["sqrtsoftplus"], kernel_device)
    assert_equals_naive(inputs, group_size=group_size)


@pytest.mark.parametrize("codewords_of_a_chunk", (1, 3))
def test_chunks_of_codewords_change_nothing(codewords_of_a_chunk, monkeypatch, kernel_device):
    monkeypatch.setattr(kernels, "MAX_CANDIDATE_KEYS", codewords_of_a_chunk * 3 * 32 + 5)
    assert_equals_naive(make_inputs((5, 33, 150, 3), torch.float32, RANKED_BY["bias"], kernel_device))


@pytest.mark.parametrize("shape", ((5, 33, 150, 3), (4, 8, 40, 9)))
def test_the_keys_take_the_bytes_that_a_plan_counts(shape, monkeypatch, kernel_device):
    num_clusters, _, num_experts, shortlist_size = shape
    inputs = make_inputs(shape, torch.float32, RANKED_BY["bias"], kernel_device)
    made, empty = [], torch.empty

    def record(*size, **options):
        made.append(empty(*size, **options))
        return made[-1]

    monkeypatch.setattr(torch, "empty", record)
    ranking = kernels.rank_experts(*inputs)
    keys = [one for one in made if one.dtype == torch.int64 and one.dim() == 2 and one is not ranking[0]]
    assert len(keys) == 2
    assert sum(one.nbytes for one in keys) == kernel_bytes(num_clusters, num_experts, shortlist_size)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_lower_id_wins_a_tie(dtype, kernel_device):
    """Small integers, whose products are exact: many experts, groups and codewords are equally good."""
    generator = torch.Generator().manual_seed(0)
    codewords = torch.randint(-1, 2, (140, 3), generator=generator).float()
    weight, bias = (
        torch.randint(-1, 2, (100, 3), generator=generator),
        torch.randint(-1, 2, (100,), generator=generator),
    )
    inputs = (codewords, torch.ones(140), weight.to(dtype), bias.to(dtype), 19)
    assert_equals_naive(tuple(x.to(kernel_device) if torch.is_tensor(x) else x for x in inputs))


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
@pytest.mark.parametrize("score_function", ("sigmoid", "sqrtsoftplus"))
def test_score_functions_far_from_zero(score_function, kernel_device):
    """One expert per score: each rounds as torch's function does, to infinitely small numbers and to saturation."""
    values = torch.tensor([-200.0, -80.0, -40.0, -20.0, -16.5, -5.0, 0.0, 5.0, 16.5, 19.9, 20.1, 40.0, 200.0])
    weight = values.unsqueeze(1).to(kernel_device)
    one = torch.ones(1, 1, device=kernel_device)
    zeros = torch.zeros(13, device=kernel_device)
    _, _, score = kernels.rank_experts(one, one[0], weight, None, 13, score_function, zeros)
    expected = naive_scores(one.double(), one[0].double(), weight.double(), None, score_function, zeros.double())[0]
    # A GPU rounds the argument of its exponential to a multiple of 2^-24 of it.
    torch.testing.assert_close(score.double(), expected, rtol=2e-5, atol=1e-37)


def test_centers_that_are_not_finite_rank_first(kernel_device):
    codewords, scale, weight, *_ = make_inputs((6, 33, 90, 2), torch.float32, RANKED_BY["scores"], kernel_device)
    weight[40] = math.nan
    lists, nearest, score = kernels.rank_experts(codewords, scale, weight, None, 2)
    assert (lists[:, 0] == 40).all() and nearest[40] == 0 and score[40] == math.inf
    others = torch.arange(90, device=kernel_device) != 40
    expected, _, expected_score = naive_rank_experts(codewords, scale, weight[others], None, 1)
    assert torch.equal(lists[:, 1:], expected + (expected >= 40))
    torch.testing.assert_close(score[others], expected_score)


def test_scale_matters_only_beside_a_bias(kernel_device):
    codewords, scale, weight, bias, *_ = make_inputs((6, 33, 90, 2), torch.float32, (True, None), kernel_device)
    ones = torch.ones_like(scale)
    for part, other in zip(
        kernels.rank_experts(codewords, scale, weight, None, 9),
        kernels.rank_experts(codewords, ones, weight, None, 9),
        strict=True,
    ):
        assert torch.equal(part, other)
    lists = [kernels.rank_experts(codewords, values, weight, bias, 9)[0] for values in (scale, ones)]
    assert not torch.equal(*lists)


def test_worked_example(kernel_device):
    codewords = torch.eye(2, device=kernel_device)
    weight = torch.tensor([[1.0, 0.0], [0.0, 3.0], [2.0, 2.0]], device=kernel_device)
    lists, nearest, score = kernels.rank_experts(codewords, torch.ones(2, device=kernel_device), weight, None, 2)
    assert lists.tolist() == [[2, 0], [1, 2]]
    assert nearest.tolist() == [0, 1, 0]
    assert score.tolist() == [1, 3, 2]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"codewords": torch.zeros(2, 5)}, "same H"),
        ({"codewords": torch.zeros(2, 4).half()}, "codewords"),
        ({"scale": torch.zeros(3)}, "C = 2"),
        ({"bias": torch.zeros(8)}, "bias .* E = 9"),
        ({"score_function": "sigmoid", "expert_bias": torch.zeros(8)}, "expert_bias"),
        ({"shortlist_size": 10}, r"shortlist_size \(10\)"),
        ({"score_function": "softmax"}, "softmax"),
        ({"score_function": "sigmoid"}, "given together"),
        ({"expert_bias": torch.zeros(9)}, "given together"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_what_does_not_fit_is_refused(change, message, backend):
    inputs = {
        "codewords": torch.zeros(2, 4),
        "scale": torch.zeros(2),
        "weight": torch.zeros(9, 4),
        "bias": None,
        "shortlist_size": 3,
    }
    with pytest.raises(ValueError, match=message):
        rank_experts(**(inputs | change))


@pytest.mark.gpu
@pytest.mark.parametrize("ranked_by", RANKED_BY.values(), ids=RANKED_BY)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large(dtype, ranked_by, cuda):
    """Scores equal to those of the reference's lists: among so many experts, some near ties fall otherwise."""
    inputs = make_inputs((512, 1024, 65536, 512), dtype, ranked_by, cuda)
    lists, nearest, score = kernels.rank_experts(*inputs)
    wide = in_fp64(inputs)
    scores = naive_scores(*wide[:4], *wide[5:])
    tolerance = 1e-5 * scores.abs().max().item()
    torch.testing.assert_close(scores.gather(1, lists), scores.topk(512, dim=1).values, rtol=0, atol=tolerance)
    torch.testing.assert_close(scores.gather(0, nearest.unsqueeze(0))[0], scores.amax(dim=0), rtol=0, atol=tolerance)
    torch.testing.assert_close(score.double(), scores.amax(dim=0), rtol=0, atol=tolerance)
    assert (lists.sort(dim=1).values.diff(dim=1) > 0).all()


@pytest.mark.gpu
def test_weight_beyond_2_31_elements(cuda):
    """The best experts of each codeword, made so, are the last ones."""
    num_experts, hidden_size = 2**20 + 37, 2048
    codewords, scale, *_ = make_inputs((64, hidden_size, 1, 1), torch.bfloat16, RANKED_BY["scores"], cuda)
    weight = torch.zeros(num_experts, hidden_size, dtype=torch.bfloat16, device=cuda)
    weight[-64:] = codewords.bfloat16()
    lists, nearest, score = kernels.rank_experts(codewords, scale, weight, None, 40)
    last = torch.arange(num_experts - 64, num_experts, device=cuda)
    assert torch.equal(lists[:, 0], last)
    assert torch.equal(nearest[-64:], torch.arange(64, device=cuda))
    assert (score[-64:] > 0.99).all() and not score[:-64].any()
