"""The input norms: what they make of tokens, how their statistics are learned, and what routers make of them."""

import pytest
import torch

from air_moe_megatron.command.checkpoints import checks
from air_moe_megatron.command.checkpoints.reader import Checkpoint, Location
from air_moe_megatron.learned.low_rank_whitening_norm import LowRankWhiteningNorm, power_iteration
from air_moe_megatron.learned.running_norm import RunningNorm
from air_moe_megatron.learned.whitening_norm import WhiteningNorm, is_factorized, whitening_of
from air_moe_megatron.routers import ROUTERS
from air_moe_megatron.sync import discard_statistics, update_codebooks
from tests.builders import make_config, make_router

HIDDEN = 16
NORMS = {"running": RunningNorm, "low_rank_whitening": LowRankWhiteningNorm, "whitening": WhiteningNorm}
every_norm = pytest.mark.parametrize("name", NORMS)


def batches(count, size=40):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(size, HIDDEN, generator=generator) * 3.0 + 100.0 for _ in range(count)]


def learn(norm, *microbatches, padding_mask=None):
    for tokens in microbatches:
        norm.accumulate(tokens, padding_mask)
    norm.apply_update(norm.statistics.clone(), True, bool(norm.num_tokens(norm.statistics) > 0))
    norm.discard()


def test_it_changes_nothing_before_the_first_update_and_the_first_batch_counts_alone():
    norm, (tokens,) = RunningNorm(HIDDEN), batches(1)
    torch.testing.assert_close(norm(tokens), tokens, rtol=1e-4, atol=0)
    learn(norm, tokens[:15], tokens[15:])
    torch.testing.assert_close(norm.mean, tokens.mean(dim=0), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(norm.variance, tokens.double().var(dim=0, unbiased=False), rtol=1e-3, atol=1e-3)
    found = norm(tokens)
    torch.testing.assert_close(found.mean(dim=0), torch.zeros(HIDDEN), rtol=0, atol=1e-3)
    torch.testing.assert_close(found.std(dim=0, unbiased=False), torch.ones(HIDDEN), rtol=1e-3, atol=1e-3)


def test_whitened_tokens_have_their_correlations_halved_by_eigenvalues():
    """Of correlations R with eigenvalues r, those of the whitened tokens have the eigenvalues r / (r/2 + 1/2)."""
    norm, (tokens,) = WhiteningNorm(HIDDEN), batches(1, size=400)
    mixing = torch.randn(HIDDEN, HIDDEN, generator=torch.Generator().manual_seed(1))
    tokens = tokens @ mixing * torch.logspace(-2, 2, HIDDEN)
    torch.testing.assert_close(norm(tokens), tokens)  # nothing was learned yet
    learn(norm, tokens[:150], tokens[150:])
    found = norm(tokens)
    torch.testing.assert_close(found.mean(dim=0), torch.zeros(HIDDEN), rtol=0, atol=1e-3)
    before = torch.linalg.eigvalsh(torch.corrcoef(tokens.double().t()))
    after = torch.linalg.eigvalsh(torch.cov(found.double().t(), correction=0))
    torch.testing.assert_close(after, 2 * before / (before + 1), rtol=1e-2, atol=1e-2)


def test_whitening_of_a_singular_covariance_is_finite():
    whitening = whitening_of(torch.ones(4, 4))
    assert whitening.isfinite().all()
    assert whitening_of(torch.zeros(4, 4)).isfinite().all()
    expected = torch.tensor([[0.5, 0.0], [0.0, 1.0 / 3.0]])
    torch.testing.assert_close(whitening_of(torch.tensor([[4.0, 0.0], [0.0, 9.0]])), expected, rtol=1e-5, atol=0)


def test_low_rank_whitening_finds_the_largest_directions_and_scales_all_others_alike():
    """With eigenvectors U and eigenvalues e of the correlations, the result is what the docstring's formula says."""
    norm = LowRankWhiteningNorm(HIDDEN)
    rank = norm.basis.shape[1]
    mixing = torch.randn(HIDDEN, HIDDEN, generator=torch.Generator().manual_seed(1)) * torch.logspace(0.7, -1, HIDDEN)
    tokens = (batches(1, size=4000)[0] - 100.0) @ mixing.t() * torch.logspace(-2, 2, HIDDEN) + 5.0
    torch.testing.assert_close(norm(tokens), tokens, rtol=1e-4, atol=0)  # nothing was learned yet
    for _ in range(200):
        learn(norm, tokens[:1500], tokens[1500:])
    values, vectors = torch.linalg.eigh(torch.corrcoef(tokens.double().t()))
    torch.testing.assert_close(norm.eigenvalues.double(), values[-rank:], rtol=1e-2, atol=1e-2)
    shrunk = (values + 1.0) / 2.0
    others = shrunk[:-rank].mean()
    gains = torch.cat((torch.full((HIDDEN - rank,), float(others)), shrunk[-rank:])).rsqrt()
    scaled = (tokens - tokens.mean(dim=0)).double() / tokens.double().std(dim=0, correction=0)
    torch.testing.assert_close(norm(tokens).double(), scaled @ vectors * gains @ vectors.t(), rtol=1e-2, atol=3e-2)


def test_a_power_iteration_keeps_orthonormal_directions_and_weighs_past_and_batch():
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(3, HIDDEN, HIDDEN, dtype=torch.float64, generator=generator)
    correlations = root @ root.transpose(1, 2)
    values, vectors = torch.linalg.eigh(correlations)
    basis, eigenvalues = vectors[..., -4:], values[..., -4:]
    for rate in (1.0, 0.1):  # past and batch agree: a fixed point
        found, sizes = power_iteration(basis, eigenvalues, correlations @ basis, rate)
        torch.testing.assert_close(sizes, eigenvalues)
        torch.testing.assert_close((found * basis).sum(dim=1).abs(), torch.ones(3, 4, dtype=torch.float64))
    _, sizes = power_iteration(basis, eigenvalues, 3.0 * correlations @ basis, 0.25)
    torch.testing.assert_close(sizes, (0.75 + 0.25 * 3.0) * eigenvalues)
    found, _ = power_iteration(basis, eigenvalues, torch.randn(3, HIDDEN, 4, dtype=torch.float64), 0.5)
    torch.testing.assert_close(found.transpose(1, 2) @ found, torch.eye(4, dtype=torch.float64).expand(3, 4, 4))


def test_directions_that_vanish_come_back():
    """Tokens with one direction only, and then with all."""
    norm, one = LowRankWhiteningNorm(HIDDEN), torch.linspace(-1.0, 1.0, 40).unsqueeze(1).expand(40, HIDDEN)
    for _ in range(50):
        learn(norm, one)
    torch.testing.assert_close(norm.eigenvalues[-1].item(), float(HIDDEN), rtol=1e-3, atol=0)
    assert norm.eigenvalues[:-1].abs().max() < 1e-3
    torch.testing.assert_close(norm.basis.t() @ norm.basis, torch.eye(len(norm.eigenvalues)), rtol=0, atol=1e-3)
    tokens = torch.randn(4000, HIDDEN, generator=torch.Generator().manual_seed(2))
    for _ in range(100):
        learn(norm, tokens)
    torch.testing.assert_close(norm.eigenvalues, torch.ones_like(norm.eigenvalues), rtol=0, atol=0.15)


@pytest.mark.parametrize("size", (1e6, 1e12, 1e18))
def test_a_batch_of_far_larger_tokens_leaves_finite_directions(size):
    """The sums of products are finite up to 3e38, and eigenvalues are at most H."""
    norm = LowRankWhiteningNorm(HIDDEN)
    for factor in (1.0, 1.0, size, 1.0):
        tokens = (batches(1)[0] - 100.0) * factor
        learn(norm, tokens)
        assert norm.eigenvalues.max() <= HIDDEN and norm.basis.isfinite().all() and norm(tokens).isfinite().all()
    torch.testing.assert_close(norm.basis.t() @ norm.basis, torch.eye(len(norm.eigenvalues)), rtol=0, atol=1e-3)


@pytest.mark.parametrize("length", (lambda n: 0.9**n, lambda n: 1.1**n, lambda n: 10.0 if n == 20 else 1.0))
def test_directions_do_not_depend_on_the_length_of_the_tokens(length):
    """Correlations never change, but tokens get shorter or longer in each batch, or one batch has far longer ones."""
    steady, changing = LowRankWhiteningNorm(HIDDEN), LowRankWhiteningNorm(HIDDEN)
    mixing = torch.randn(HIDDEN, HIDDEN, generator=torch.Generator().manual_seed(1)) * torch.logspace(0.7, -1, HIDDEN)
    for number in range(40):
        tokens = torch.randn(500, HIDDEN, generator=torch.Generator().manual_seed(number)) @ mixing.t()
        learn(steady, tokens)
        learn(changing, tokens * length(number))
        torch.testing.assert_close(changing.eigenvalues, steady.eigenvalues, rtol=0.05, atol=0.02)
        assert changing.eigenvalues.sum() < HIDDEN * 1.001


@pytest.mark.parametrize("size", (1e4, 1e6, 1e8))
def test_one_far_longer_token_does_not_cost_the_directions(size):
    norm, clean = LowRankWhiteningNorm(HIDDEN), LowRankWhiteningNorm(HIDDEN)
    mixing = torch.randn(HIDDEN, HIDDEN, generator=torch.Generator().manual_seed(1)) * torch.logspace(0.7, -1, HIDDEN)
    for number in range(60):
        tokens = torch.randn(500, HIDDEN, generator=torch.Generator().manual_seed(number)) @ mixing.t()
        learn(clean, tokens)
        if number == 20:
            tokens = torch.cat((size * tokens[:1], tokens[1:]))
        learn(norm, tokens)
        torch.testing.assert_close(norm.basis.t() @ norm.basis, torch.eye(len(norm.eigenvalues)), rtol=0, atol=1e-4)
    assert (norm.basis.t() @ clean.basis[:, -4:]).norm(dim=0).min() > 0.9
    assert norm.eigenvalues.sum() < HIDDEN * 1.001


def test_a_batch_of_equal_tokens_leaves_the_directions():
    norm = LowRankWhiteningNorm(HIDDEN)
    for tokens in batches(5):
        learn(norm, tokens)
    before = norm.basis.clone(), norm.eigenvalues.clone()
    learn(norm, torch.full((40, HIDDEN), 7.0))
    torch.testing.assert_close((norm.basis * before[0]).sum(dim=0).abs(), torch.ones(len(before[1])))
    torch.testing.assert_close(norm.eigenvalues, before[1])


@pytest.mark.parametrize("mean", (1e3, 1e5, 1e9))
@pytest.mark.parametrize("name", ("low_rank_whitening", "whitening"))
def test_a_covariance_that_is_lost_beside_the_mean_leaves_finite_tokens(name, mean):
    """After the first update, whose sums are taken around zero; later ones are taken around the mean."""
    norm = NORMS[name](HIDDEN)
    given = [0.01 * tokens + mean for tokens in batches(3)]
    for tokens in given:
        learn(norm, tokens)
        assert all(buffer.isfinite().all() for buffer in norm.buffers()) and norm(tokens).isfinite().all()


def test_a_matrix_without_a_factor_is_scaled_only():
    found = whitening_of(torch.tensor([[1.0, 9.0], [9.0, 4.0]]))  # a correlation of 4.5
    torch.testing.assert_close(found, torch.tensor([[1.0, 0.0], [0.0, 0.5]]), rtol=1e-4, atol=0)


def test_the_whitening_is_made_anew_more_rarely_the_older_the_statistics():
    made = [number for number in range(1, 261) if is_factorized(number)]
    assert made[:20] == list(range(1, 21)) and made[20:25] == [22, 24, 26, 28, 30]
    assert made[-4:] == [200, 220, 240, 260]


@every_norm
def test_resumed_statistics_go_on_as_they_would_have(name):
    given = batches(60)
    norm, other = NORMS[name](HIDDEN), NORMS[name](HIDDEN)
    for tokens in given[:33]:
        learn(norm, tokens)
    other.load_state_dict(norm.state_dict())
    for tokens in given[33:]:
        learn(norm, tokens)
        learn(other, tokens)
    for one, two in zip(norm.buffers(), other.buffers(), strict=True):
        assert torch.equal(one, two)


@every_norm
def test_the_first_ten_batches_count_alike_and_later_ones_a_tenth(name):
    norm, given = NORMS[name](HIDDEN), batches(12)
    for tokens in given[:10]:
        learn(norm, tokens)
    expected = torch.stack([tokens.mean(dim=0) for tokens in given[:10]]).mean(dim=0)
    torch.testing.assert_close(norm.mean, expected, rtol=1e-5, atol=1e-4)
    learn(norm, given[10])
    torch.testing.assert_close(norm.mean, 0.9 * expected + 0.1 * given[10].mean(dim=0), rtol=1e-5, atol=1e-4)


@every_norm
def test_padding_and_batches_without_tokens_do_not_count(name):
    norm, (tokens,) = NORMS[name](HIDDEN), batches(1)
    keep = torch.arange(40) < 30
    padded = tokens.clone()
    padded[30:] = float("nan")
    learn(norm, padded, padding_mask=~keep)
    torch.testing.assert_close(norm.mean, tokens[:30].mean(dim=0), rtol=1e-5, atol=1e-4)
    before = norm.mean.clone()
    learn(norm, padded, padding_mask=torch.ones(40, dtype=torch.bool))
    assert torch.equal(norm.mean, before) and int(norm.num_updates) == 1


@every_norm
def test_every_token_counts_under_autocast(name):
    hidden, found = torch.randn(3001, 4), []
    for enabled in (False, True):
        norm = NORMS[name](4)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            norm.accumulate(hidden, None)
        found.append(norm.statistics)
    assert float(norm.num_tokens(found[1])) == 3001 and torch.equal(*found)


def test_statistics_keep_their_dtypes_and_results_keep_the_dtype_of_the_tokens():
    norm = RunningNorm(HIDDEN).bfloat16()
    assert norm.mean.dtype == norm.statistics.dtype == torch.float32
    assert norm.variance.dtype == torch.float64  # a square of a finite fp32 number may be beyond fp32
    assert norm(torch.ones(2, HIDDEN, dtype=torch.bfloat16)).dtype == torch.bfloat16
    norm = WhiteningNorm(HIDDEN).bfloat16()
    assert norm.mean.dtype == norm.statistics.dtype == norm.covariance.dtype == norm.whitening.dtype == torch.float32
    assert norm(torch.ones(2, HIDDEN, dtype=torch.bfloat16)).dtype == torch.bfloat16
    norm = LowRankWhiteningNorm(HIDDEN).bfloat16()
    assert norm.mean.dtype == norm.statistics.dtype == norm.basis.dtype == norm.eigenvalues.dtype == torch.float32
    for dtype in (torch.bfloat16, torch.float64):
        assert norm(torch.ones(2, HIDDEN, dtype=dtype)).dtype == dtype


@every_norm
@pytest.mark.parametrize("router_type", ("topk", "air", "hierarchical", "vq"))
def test_a_router_sees_normalized_tokens_and_learns_only_in_training(megatron_cpu, router_type, name):
    def make(norm):
        config = make_config(moe_router_type=router_type, moe_router_input_norm=norm)
        torch.manual_seed(0)
        router = ROUTERS[router_type](config, megatron_cpu)
        router.set_layer_number(1)
        return router

    (tokens,) = batches(1)
    router, plain = make(name), make("none")
    assert type(router.learners()[0]) is NORMS[name]
    router.route(tokens)
    discard_statistics(router)  # a step that is attempted again
    router.route(tokens)
    with torch.no_grad():
        router.route(tokens * 5)
    router.eval()
    router.route(tokens * 7)
    router.train()
    update_codebooks(router)
    torch.testing.assert_close(router.input_norm.mean, tokens.mean(dim=0), rtol=1e-5, atol=1e-4)
    normal = router.input_norm(tokens)
    if router_type == "air":
        plain.codebook.load_state_dict(router.codebook.state_dict())
    hidden = tokens.clone().requires_grad_()
    routes, expected = router.route(hidden), plain.route(normal)
    assert torch.equal(routes.topk_ids.sort(dim=1).values, expected.topk_ids.sort(dim=1).values)
    torch.testing.assert_close(routes.probs, expected.probs)
    assert torch.autograd.grad(routes.probs.square().sum(), hidden)[0].abs().max() > 0


@every_norm
def test_a_token_that_is_not_finite_leaves_the_statistics_as_they_were(megatron_cpu, caplog, name):
    config = make_config(moe_router_type="topk", moe_router_input_norm=name)
    router = ROUTERS["topk"](config, megatron_cpu)
    (tokens,) = batches(1)
    router.route(tokens)
    update_codebooks(router)
    before = router.input_norm.mean.clone()
    tokens[3, 3] = float("inf")
    router.route(tokens)
    assert update_codebooks(router) == 1
    assert torch.equal(router.input_norm.mean, before) and f"{router.input_norm.title} stays" in caplog.text


@every_norm
def test_the_statistics_are_saved_and_restored(megatron_cpu, name):
    config = make_config(moe_router_type="topk", moe_router_input_norm=name)
    router, other = (ROUTERS["topk"](config, megatron_cpu) for _ in range(2))
    router.route(batches(1)[0])
    update_codebooks(router)
    other.load_state_dict(router.state_dict())
    assert torch.equal(other.input_norm.mean, router.input_norm.mean)
    assert "input_norm.statistics" not in router.state_dict()


def test_a_variance_that_was_saved_in_fp32_loads(megatron_cpu, tmp_path):
    """As checkpoints of earlier commits hold it."""
    from megatron.core import dist_checkpointing

    routers = [make_router(megatron_cpu, moe_router_type="topk", moe_router_input_norm="running") for _ in range(2)]
    routers[0].input_norm.variance.fill_(3.25)
    saved = routers[0].sharded_state_dict("router.")
    variance = saved["router.input_norm.variance"]
    variance.data, variance.dtype = variance.data.float(), torch.float32
    dist_checkpointing.save(saved, str(tmp_path))
    loaded = dist_checkpointing.load(routers[1].sharded_state_dict("router."), str(tmp_path))
    routers[1].load_state_dict({name.removeprefix("router."): value for name, value in loaded.items()})
    assert routers[1].input_norm.variance.dtype == torch.float64
    assert torch.equal(routers[1].input_norm.variance, routers[0].input_norm.variance)


@pytest.mark.parametrize(
    "found, wanted",
    (
        *(("none", "running"), ("running", "none"), ("running", "whitening"), ("whitening", "running")),
        *(("low_rank_whitening", "running"), ("running", "low_rank_whitening"), ("low_rank_whitening", "whitening")),
    ),
)
def test_a_checkpoint_with_another_norm_is_refused(found, wanted):
    def check(keys, norm):
        location = Location("--load", "folder", "iter_0000001")
        checks._check_input_norm(Checkpoint(location, False, dict.fromkeys(keys, (HIDDEN,)), (), None), norm)

    keys = ["decoder.layers.mlp.router.weight"]
    if found != "none":
        keys.append("decoder.layers.mlp.router.input_norm.mean")
    if found == "low_rank_whitening":
        keys.append("decoder.layers.mlp.router.input_norm.basis")
    if found == "whitening":
        keys.append("decoder.layers.mlp.router.input_norm.covariance")
    with pytest.raises(ValueError, match=f"was trained with --moe-router-input-norm {found}"):
        check(keys, wanted)
    check(keys, found)
    check(["decoder.layers.mlp.linear_fc1.weight"], wanted)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"moe_router_type": "hash", "moe_hash_vocab_size": 9}, "does not read hidden states"),
        ({"moe_router_type": "product_key"}, "moe_product_key_query_norm"),
        ({"moe_router_type": "product_key", "moe_router_input_norm": "whitening"}, "moe_product_key_query_norm"),
        (
            {"moe_router_input_norm": "batch"},
            r"'batch'\) must be 'none', 'running', 'low_rank_whitening' or 'whitening'",
        ),
        ({"moe_router_type": "topk", "moe_granular_experts": False, "moe_dispatch": "stock"}, "Megatron's own router"),
    ],
    ids=["hash", "product-keys", "whitened-product-keys", "unknown", "plain-topk"],
)
def test_what_cannot_be_normalized_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        make_config(**{"moe_router_type": "topk", "moe_router_input_norm": "running", **fields})
