"""Bounds never exceed the mass recall, and certificates are never wrong: on random and on adversarial centers.

The reference is exact routing in fp64. Legend as in ``ops/__init__.py``.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.builders import EXPERTS, HIDDEN, make_router

C, L, K, T = 8, 12, 4, 16
BIAS = dict(moe_router_enable_expert_bias=True)
ROUTERS = {
    "one-probe": dict(moe_air_num_probes=1),
    "three-probes": dict(moe_air_num_probes=3),
    "lists-of-experts": dict(moe_air_codebook_source="experts", moe_air_num_probes=2, moe_air_shortlist_size=L),
    "bias": dict(moe_air_num_probes=2),
    "sigmoid": dict(moe_air_num_probes=2, moe_router_score_function="sigmoid", **BIAS),
    "sqrtsoftplus": dict(moe_air_num_probes=1, moe_router_score_function="sqrtsoftplus", **BIAS),
}
KINDS = ("best-lists", "any-lists", "at-codewords", "near-codewords", "aligned", "ties", "outliers")

scenes = given(
    name=st.sampled_from(sorted(ROUTERS)),
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 2**31),
    scale=st.sampled_from((0.01, 0.3, 1.0, 3.0, 30.0)),
)


@pytest.fixture(scope="module")
def routers(megatron_cpu):
    """A router of each kind, whose numbers every test replaces."""
    lists = dict(moe_air_num_clusters=C, moe_air_shortlist_size=L, moe_router_type="air")
    made = {name: make_router(megatron_cpu, **{**lists, **fields}) for name, fields in ROUTERS.items()}
    made["bias"].bias = torch.nn.Parameter(torch.zeros(EXPERTS))
    return made


@torch.no_grad()
def arrange(router, kind, seed, scale):
    """Give a router centers, lists and tokens; lists may be anything, as between two rebuilds."""
    from air_moe_megatron.routers.air import TokenSample

    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    weight = 0.3 * normal(EXPERTS, HIDDEN) + normal(HIDDEN) * (seed % 2)
    codewords = torch.nn.functional.normalize(normal(C, HIDDEN), dim=1)
    hidden = scale * normal(T, HIDDEN)
    if kind == "ties":
        weight = weight[torch.randint(EXPERTS // 4, (EXPERTS,), generator=generator)]
    if kind == "outliers":
        weight *= 10.0 ** (2.0 * torch.rand(EXPERTS, 1, generator=generator) - 1.0)
    if kind in ("at-codewords", "near-codewords"):
        hidden = scale * (1.0 + normal(T, 1).abs()) * codewords[torch.arange(T) % C]
        hidden += (kind == "near-codewords") * 0.03 * scale * normal(T, HIDDEN)
    probes = (hidden @ codewords.t()).topk(router.sizes.num_probes, dim=1).indices
    if kind == "any-lists":
        lists = torch.stack([torch.randperm(EXPERTS, generator=generator)[:L] for _ in range(C)])
        probes = torch.stack([torch.randperm(C, generator=generator)[: probes.shape[1]] for _ in range(T)])
    else:
        lists = (codewords @ weight.t()).topk(L, dim=1).indices
    if kind == "aligned":  # what is not listed points along the residuals of some tokens, as far as it can
        nearest = codewords[probes[:, 0]]
        residual = torch.nn.functional.normalize(hidden - (hidden * nearest).sum(1, keepdim=True) * nearest, dim=1)
        unlisted = torch.ones(EXPERTS, dtype=torch.bool)
        unlisted[lists.flatten()] = False
        aligned = torch.nonzero(unlisted).flatten()
        weight[aligned] = weight.norm(dim=1).amax() * residual[torch.arange(len(aligned)) % min(T, 1 + seed % T)]
    router.weight.copy_(weight)
    if router.bias is not None:
        router.bias.copy_(normal(EXPERTS))
    if router.expert_bias is not None:
        router.expert_bias.copy_(0.1 * normal(EXPERTS))
    router.index.shortlist.copy_(lists)
    if router.index.source == "experts":  # -1 at the end of shorter lists
        router.index.shortlist[:, L - seed % 3 :] = -1
    router.codebook.codewords.copy_(codewords)
    router.codebook.ema.zero_()
    if seed % 3:  # the typical token, of any length; otherwise nothing is known of it
        length = scale * HIDDEN**0.5 * (0.1, 1.0, 30.0)[seed // 6 % 3]
        router.codebook.ema[:, -3:] = torch.tensor([1.0, 0.5 + 0.5 * (seed % 2), length])
    router.sample = TokenSample(hidden, probes, None)


class Exact:
    """What an exact router would do with the sample, in fp64."""

    def __init__(self, router):
        hidden, lists = router.sample.hidden.double(), router.index.shortlist.long()
        self.weight = router.weight.detach().double()
        self.bias = torch.zeros(EXPERTS).double() if router.bias is None else router.bias.detach().double()
        self.scores = hidden @ self.weight.t() + self.bias
        self.listed = torch.zeros(T, EXPERTS + 1, dtype=torch.bool)
        ids = lists[router.sample.probed].flatten(1).remainder(EXPERTS + 1)  # -1 is the last column
        self.listed = self.listed.scatter(1, ids, True)[:, :-1]
        self.log_odds = self.mass(~self.listed) - self.mass(self.listed)  # of the unlisted mass
        self.ranks = self.scores
        if router.expert_bias is not None:
            functions = dict(sigmoid=torch.sigmoid, sqrtsoftplus=lambda x: torch.nn.functional.softplus(x).sqrt())
            self.ranks = functions[router.score_function](self.scores) + router.expert_bias.double()
        lowest = self.ranks.masked_fill(~self.listed, -math.inf).topk(K, dim=1).values[:, -1]
        self.gap = lowest - self.ranks.masked_fill(self.listed, -math.inf).amax(dim=1)
        # No computed score is further from these: H + 16 roundings of 2^-24, and room.
        longest = self.weight.norm(dim=1).amax()
        self.error = 3.0 * (HIDDEN + 16) * 2.0**-24 * (hidden.norm(dim=1) * longest + self.bias.abs().amax())

    def mass(self, where, scores=None):
        return (self.scores if scores is None else scores).masked_fill(~where, -math.inf).logsumexp(dim=1)

    def assert_below(self, bound):
        """In odds, which resolve masses near 0 and 1; the bounds are rounded to fp32, tiny ones to few digits."""
        below = bound.double() * (1.0 - 2.0**-22)
        odds = torch.log1p(-below) - below.log()
        assert ((odds >= self.log_odds - 2.0 * self.error - 1e-6) | (bound < 1e-37)).all()

    def assert_right(self, certified):
        assert (self.gap[certified] >= 0).all()

    def split(self, router):
        """Anchors and residuals at the nearest codewords, and every center's reach."""
        hidden, direction = router.sample.hidden.double(), router.codebook.codewords.double()
        direction = torch.nn.functional.normalize(direction, dim=1)[router.sample.probed[:, 0]]
        anchor = (hidden * direction).sum(dim=1, keepdim=True) * direction
        return anchor, hidden - anchor, direction


def paper_log_odds(exact, router):
    """log of ``exp(D) * (1 - m) / m``, as the theorem has it."""
    anchor, residual, _ = exact.split(router)
    scores = anchor @ exact.weight.t() + exact.bias
    radius = (exact.weight - exact.weight.mean(dim=0)).norm(dim=1).amax()
    masses = exact.mass(~exact.listed, scores) - exact.mass(exact.listed, scores)
    return masses + 2.0 * residual.norm(dim=1) * radius


def moment_log_odds(exact, router):
    """log of the bounded unlisted mass over the listed one, with plain exponentials."""
    anchor, residual, direction = exact.split(router)
    x = exact.weight - exact.weight.mean(dim=0)
    scores = anchor @ exact.weight.t() + exact.bias + (residual @ exact.weight.mean(dim=0)).unsqueeze(1)
    gains = residual @ x.t()
    reach = (x.square().sum(dim=1) - (direction @ x.t()).square()).clamp(min=0).sqrt()
    limit = residual.norm(dim=1, keepdim=True) * reach + 1e-12
    phi = torch.where(limit < 1e-4, 0.5 + limit / 6, (torch.expm1(limit) - limit) / limit.square())
    growth = (1.0 + gains + gains.square() * phi).masked_fill(exact.listed, 0.0)
    return (scores.exp() * growth).sum(dim=1).log() - exact.mass(exact.listed)


@scenes
@settings(max_examples=500)
def test_the_theorems_hold_in_fp64(routers, name, kind, seed, scale):
    router = routers[name]
    arrange(router, kind, seed, scale)
    exact = Exact(router)
    assert (paper_log_odds(exact, router) >= exact.log_odds - 1e-9 * (1.0 + exact.log_odds.abs())).all()
    if scale <= 3.0:  # beyond, exponentials leave the range of fp64
        moments = moment_log_odds(exact, router)
        assert (moments >= exact.log_odds - 1e-9 * (1.0 + exact.log_odds.abs())).all()
        assert (moments <= paper_log_odds(exact, router) + 1e-9 * (1.0 + moments.abs())).all()


@scenes
@settings(max_examples=200)
def test_the_theorem_of_expert_codebooks_holds_in_fp64(routers, name, kind, seed, scale):
    """Each center is replaced by a codeword of any length, the nearest one."""
    router = routers[name]
    arrange(router, kind, seed, scale)
    exact, codewords = Exact(router), router.codebook.codewords.double()
    along, nearest = (exact.weight @ codewords.t()).max(dim=1)
    stand_ins = along.unsqueeze(1) * codewords[nearest]
    hidden = router.sample.hidden.double()
    scores = hidden @ stand_ins.t() + exact.bias
    error = (exact.weight - stand_ins).norm(dim=1).amax()
    odds = exact.mass(~exact.listed, scores) - exact.mass(exact.listed, scores) + 2.0 * error * hidden.norm(dim=1)
    assert (odds >= exact.log_odds - 1e-9 * (1.0 + exact.log_odds.abs())).all()


@scenes
@settings(max_examples=500)
def test_measured_bounds_never_exceed_the_recall(routers, name, kind, seed, scale):
    from air_moe_megatron.diagnostics.recall import measure

    router = routers[name]
    arrange(router, kind, seed, scale)
    exact = Exact(router)
    for num_verified in (0, seed % 7, L):
        figures = measure(router, num_verified)
        assert (figures.paper_bound <= figures.mass_recall).all()
        assert (figures.mass_bound <= figures.mass_recall).all()
        exact.assert_right(figures.certified)
    exact.assert_below(figures.paper_bound)
    exact.assert_below(figures.mass_bound)
    recall_error = (torch.sigmoid(-exact.log_odds) - figures.mass_recall).abs()
    assert (recall_error <= 2.0 * exact.error + 1e-6).all()


@scenes
@settings(max_examples=300)
def test_kept_constants_are_never_wrong(routers, name, kind, seed, scale):
    from air_moe_megatron.diagnostics.bounds import FrozenBounds

    router = routers[name]
    arrange(router, kind, seed, scale)
    exact = Exact(router)
    bounds = FrozenBounds(router, (0, seed % 7, L, EXPERTS)[seed % 4])
    tokens = router.sample.hidden, router.sample.probed
    exact.assert_right(bounds.certified(*tokens))
    exact.assert_below(bounds.mass_bound(*tokens))


@pytest.mark.parametrize("name", sorted(ROUTERS))
@pytest.mark.parametrize("scale", (0.3, 1.0))
def test_measured_bounds_are_the_theorems(routers, name, scale):
    from air_moe_megatron.diagnostics.recall import measure

    router = routers[name]
    arrange(router, "best-lists", 5, scale)
    exact, figures = Exact(router), measure(router)
    assert torch.allclose(figures.paper_bound.double(), torch.sigmoid(-paper_log_odds(exact, router)), rtol=1e-3)
    assert torch.allclose(figures.mass_bound.double(), torch.sigmoid(-moment_log_odds(exact, router)), rtol=1e-3)
    assert (figures.mass_bound > figures.paper_bound).all()


@pytest.mark.parametrize("name", sorted(ROUTERS))
def test_both_are_tight_without_a_residual(routers, name):
    """At codewords the bounds are the recall, and whoever leads by more than the rounding is certified."""
    from air_moe_megatron.diagnostics.bounds import FrozenBounds
    from air_moe_megatron.diagnostics.recall import measure

    router = routers[name]
    arrange(router, "at-codewords", 7, 1.0)
    exact, figures = Exact(router), measure(router, 0)
    assert torch.allclose(figures.paper_bound, figures.mass_recall, rtol=1e-3)
    assert torch.allclose(figures.mass_bound, figures.mass_recall, rtol=1e-3)
    clear = exact.gap > 1e-3
    assert torch.equal(figures.certified, clear)
    if router.bias is None:  # kept constants have one anchor per codeword: with a bias, one length of tokens
        certified = FrozenBounds(router, 0).certified(router.sample.hidden, router.sample.probed)
        if router.expert_bias is None:
            assert torch.equal(certified, clear)
        assert not (certified & ~clear).any()


def test_the_kept_mass_bound_is_tight_at_the_anchor(routers):
    from air_moe_megatron.diagnostics.bounds import FrozenBounds

    router = routers["one-probe"]
    arrange(router, "at-codewords", 7, 1.0)
    router.codebook.ema[:, -3:] = torch.tensor([1.0, 0.9, 2.0])  # typical: 1.8 times the codeword
    tokens = 1.8 * router.codebook.codewords, torch.arange(C).unsqueeze(1)
    scores = tokens[0].double() @ router.weight.double().t()
    mass = scores.softmax(dim=1).gather(1, router.index.shortlist.long()).sum(dim=1)
    for num_verified in (0, 5):
        assert torch.allclose(FrozenBounds(router, num_verified).mass_bound(*tokens).double(), mass, rtol=1e-3)


@pytest.mark.parametrize("name", ["one-probe", "bias", "sigmoid"])
def test_lists_of_all_experts_are_certain(megatron_cpu, name):
    from air_moe_megatron.diagnostics.bounds import FrozenBounds
    from air_moe_megatron.diagnostics.recall import measure

    fields = {**ROUTERS[name], "moe_router_type": "air", "moe_air_num_clusters": 4, "moe_air_num_probes": 1}
    router = make_router(megatron_cpu, **fields, moe_air_shortlist_size=EXPERTS)
    if name == "bias":
        router.bias = torch.nn.Parameter(torch.randn(EXPERTS))
    router.route(torch.randn(30, HIDDEN))
    figures, bounds = measure(router), FrozenBounds(router)
    assert (figures.paper_bound == 1).all() and (figures.mass_bound == 1).all() and figures.certified.all()
    tokens = router.sample.hidden, router.sample.probed
    assert bounds.certified(*tokens).all()
    assert torch.allclose(bounds.mass_bound(*tokens), torch.ones(30), atol=1e-3)


def test_more_verified_experts_certify_more(routers):
    from air_moe_megatron.diagnostics.recall import measure

    router = routers["three-probes"]
    arrange(router, "near-codewords", 3, 1.0)
    noise = torch.randn(T, HIDDEN, generator=torch.Generator().manual_seed(0))
    router.sample.hidden.add_(0.2 * noise)
    counts = [int(measure(router, num).certified.sum()) for num in (0, 2, 8, EXPERTS)]
    assert counts == sorted(counts) and counts[0] < counts[-1]
    assert counts[-1] == int((Exact(router).gap > 1e-3).sum())


def test_chunks_and_blocks_change_nothing(routers, monkeypatch):
    from air_moe_megatron.diagnostics import bounds, recall, splits

    router = routers["sigmoid"]
    arrange(router, "best-lists", 11, 1.0)
    tokens = router.sample.hidden, router.sample.probed

    def figures():
        kept = bounds.FrozenBounds(router)
        return (*recall.measure(router), kept.certified(*tokens), kept.mass_bound(*tokens))

    expected = figures()
    for module in (recall, bounds, splits):
        monkeypatch.setattr(module, "CHUNK", 10)
    monkeypatch.setattr(bounds, "_BLOCK", 3 * EXPERTS)
    for value, other in zip(expected, figures(), strict=True):
        assert torch.allclose(value.double(), other.double(), atol=1e-5)


def test_the_study_measures_and_plots(routers, tmp_path):
    import pandas

    from benchmarks.quality import bounds as study

    assert study.find_run(4096).flags["seed"] == 1
    with pytest.raises(ValueError, match=r"experts \(5\) must be a size of the air runs"):
        study.find_run(5)
    router = routers["three-probes"]
    arrange(router, "near-codewords", 3, 1.0)
    rows = [study.measure_step(router, iteration) for iteration in study.KEPT_STEPS]
    assert all(row["violations"] == 0 and row["kept_bound"] <= row["mass_recall"] for row in rows)
    assert [row["tokens"] for row in rows] == [T] * len(rows)  # those that were sampled, not those asked for
    table = pandas.DataFrame(rows)
    figure = study.plot(table, tmp_path / "bounds.png")
    assert (tmp_path / "bounds.png").is_file()
    names = (("mass_recall", "mass_bound", "paper_bound"), ("exact", "certified_L", "certified_0"))
    for axis, columns in zip(figure.axes, names, strict=True):
        drawn = [[list(values) for values in line.get_data()] for line in axis.get_lines()]
        assert drawn == [[list(study.KEPT_STEPS), list(table[column])] for column in columns]


def test_the_study_samples_as_many_tokens_as_it_asks_for(monkeypatch):
    from air_moe_megatron.routers import air
    from benchmarks.quality import bounds as study

    monkeypatch.setattr(air, "SAMPLE_SIZE", air.SAMPLE_SIZE)
    study.set_sample_size(study.NUM_TOKENS)
    # Of 2,048 tokens in 16 sequences every fifth: every fourth would be of a quarter of the sequences.
    assert air.sample_step(2048, 1) == 4 and air.sample_step(2048, 16) == 5
    monkeypatch.delattr(air, "SAMPLE_SIZE")
    with pytest.raises(AttributeError, match="SAMPLE_SIZE"):
        study.set_sample_size(study.NUM_TOKENS)


def test_constants_of_changed_routers_are_refused(routers):
    from air_moe_megatron.diagnostics.bounds import FrozenBounds

    router = routers["sigmoid"]
    arrange(router, "best-lists", 1, 1.0)
    tokens = router.sample.hidden, router.sample.probed
    for tensor in (router.weight, router.expert_bias, router.index.shortlist, router.codebook.codewords):
        bounds = FrozenBounds(router)
        bounds.certified(*tokens)
        # As optimizers write, without a trace in the tensor's version.
        tensor.data.copy_(tensor.data + 1 if tensor.is_floating_point() else tensor.data.flip(0))
        for ask in (bounds.certified, bounds.mass_bound):
            with pytest.raises(ValueError, match="have changed since"):
                ask(*tokens)
    with pytest.raises(ValueError, match=r"num_verified \(-1\) must be at least 0"):
        FrozenBounds(router, -1)
    with pytest.raises(ValueError, match="with_mass"):
        FrozenBounds(router, with_mass=False).mass_bound(*tokens)


def test_the_inequality_behind_the_moments():
    from air_moe_megatron.diagnostics.splits import bennett, log_growth

    limit = torch.cat((torch.zeros(1), torch.logspace(-12, 2, 200))).double().unsqueeze(1)
    value = (limit * torch.linspace(-1, 1, 101).double()).double()
    assert (log_growth(value, limit.expand_as(value)) >= value - 1e-12).all()
    assert bennett(torch.tensor([0.0, 1.0]).double()).tolist() == pytest.approx([0.5, math.e - 2.0])
    assert log_growth(torch.tensor([1.0]).double(), torch.tensor([1e4]).double()).item() == 1e4  # out of range


def test_the_rounding_of_a_product():
    from air_moe_megatron.diagnostics.splits import relative_rounding

    generator = torch.Generator().manual_seed(0)
    rows, columns = torch.randn(300, 128, generator=generator), torch.randn(128, 300, generator=generator)
    error = (rows @ columns - rows.double() @ columns.double()).abs()
    lengths = rows.double().norm(dim=1, keepdim=True) * columns.double().norm(dim=0)
    assert (error <= relative_rounding(128) * lengths).all()
    assert relative_rounding(128) == pytest.approx(8.6e-6, rel=0.01)
    try:
        torch.set_float32_matmul_precision("high")
        assert relative_rounding(128) == pytest.approx(0.0756, rel=0.01)
    finally:
        torch.set_float32_matmul_precision("highest")
