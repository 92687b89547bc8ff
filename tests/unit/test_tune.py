"""Choosing AIR's sizes: what lists hold of the exact routing, which settings are tried, and which one is chosen."""

import argparse
import math
from dataclasses import replace

import numpy
import pytest
import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from air_moe_megatron.config import invalid
from air_moe_megatron.diagnostics.recall import measure_sample
from air_moe_megatron.diagnostics.two_stages import TwoStages
from air_moe_megatron.inference.data import TokenStream
from air_moe_megatron.learned.centers import Centers
from air_moe_megatron.learned.index import ShortlistIndex
from air_moe_megatron.learned.lists import reserved_slots
from air_moe_megatron.ops.coarse import assign
from air_moe_megatron.routers import AIRRouter
from air_moe_megatron.routers.air import TokenSample
from air_moe_megatron.routers.flops import Rebuilds
from air_moe_megatron.routers.learned_bytes import learned_bytes
from air_moe_megatron.tune import capture
from air_moe_megatron.tune import search as searching
from air_moe_megatron.tune.baselines import measure_groups, measure_product_keys
from air_moe_megatron.tune.command import check, check_fit, check_grid
from air_moe_megatron.tune.measured import Measured
from air_moe_megatron.tune.recall import (
    Layer,
    fit_codebook,
    make_lists,
    recall_of_lists,
    time_exact,
    time_search,
)
from air_moe_megatron.tune.report import report
from air_moe_megatron.tune.search import (
    Result,
    Setting,
    air_config,
    automatic,
    best,
    cheapest,
    flops_of,
    frontier,
    grid,
    of_type,
    search,
)
from tests.builders import make_config, make_router

pytestmark = pytest.mark.usefixtures("megatron_cpu")

HIDDEN, EXPERTS, TOPK = 16, 64, 4


def make_layer(num_fit=256, num_test=33, bias=False, expert_bias=False) -> Layer:
    """A layer of random centers, and of tokens that lie around a few directions."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(8, HIDDEN, generator=generator)
    tokens = directions[torch.arange(num_fit + num_test) % 8]
    tokens = tokens + 0.3 * torch.randn(tokens.shape, generator=generator)
    extra = torch.randn(2, EXPERTS, generator=generator)
    centers = Centers(torch.randn(EXPERTS, HIDDEN, generator=generator), extra[0] if bias else None)
    if expert_bias:
        centers = replace(centers, score_function="sigmoid", expert_bias=extra[1])
    return Layer("1", tokens[:num_fit], tokens[num_fit:], centers, TOPK)


def naive_recall(layer, probes, lists):
    """Top-k and mass recall in words."""
    topk = mass = 0.0
    for hidden, chosen in zip(layer.test, probes.tolist(), strict=True):
        logits = layer.centers.weight @ hidden + (0.0 if layer.centers.bias is None else layer.centers.bias)
        scores = logits if layer.centers.expert_bias is None else logits.sigmoid() + layer.centers.expert_bias
        listed = {expert for one in chosen for expert in lists[one].tolist()}
        topk += len(listed & set(scores.topk(layer.topk).indices.tolist())) / layer.topk
        mass += logits.softmax(dim=0)[sorted(listed)].sum().item()
    return topk / len(layer.test), mass / len(layer.test)


@pytest.mark.parametrize("biases", [{}, {"bias": True}, {"expert_bias": True}], ids=["plain", "bias", "expert-bias"])
def test_recall_is_that_of_a_loop_over_tokens(biases):
    layer = make_layer(**biases)
    codebook = fit_codebook(layer.fit, 8)
    probes = assign(layer.test, codebook.codewords, 4)
    lists = make_lists(layer, codebook, [8, 16])
    topk, mass, _ = recall_of_lists(layer, probes, lists, [1, 3, 4])
    for row, listed in enumerate(lists):
        for column, num_probes in enumerate((1, 3, 4)):
            expected = naive_recall(layer, probes[:, :num_probes], listed)
            assert (float(topk[row, column]), float(mass[row, column])) == pytest.approx(expected, abs=1e-6)
    assert (topk.diff(dim=1) >= 0).all() and (mass.diff(dim=1) >= 0).all()


def test_recall_is_that_of_the_routers_own_metrics():
    layer = make_layer()
    codebook = fit_codebook(layer.fit, 8)
    (lists,) = make_lists(layer, codebook, [8])
    probes = assign(layer.test, codebook.codewords, 2)
    topk, mass, _ = recall_of_lists(layer, probes, [lists], [2])
    stages = TwoStages(codebook.codewords, lists, layer.centers, layer.topk, layer.centers.expert_bias)
    metrics = measure_sample(stages, TokenSample(layer.test, probes, None))
    assert float(topk) == pytest.approx(float(metrics.topk_recall.mean()), abs=1e-6)
    assert float(mass) == pytest.approx(float(metrics.mass_recall.mean()), abs=1e-5)
    assert (metrics.mass_bound <= metrics.mass_recall + 1e-5).all()


def test_tokens_in_several_pieces_give_the_same_recall(monkeypatch):
    layer = make_layer()
    codebook = fit_codebook(layer.fit, 8)
    arguments = layer, assign(layer.test, codebook.codewords, 2), make_lists(layer, codebook, [8]), [1, 2], [TOPK]
    whole = recall_of_lists(*arguments)
    monkeypatch.setattr("air_moe_megatron.tune.recall._SCORES", 5 * EXPERTS)
    for one, other in zip(recall_of_lists(*arguments), whole, strict=True):
        assert torch.allclose(one, other, atol=1e-12)


def test_a_full_list_finds_everything():
    layer = make_layer()
    codebook = fit_codebook(layer.fit, 4)
    (lists,) = make_lists(layer, codebook, [EXPERTS])
    topk, mass, _ = recall_of_lists(layer, assign(layer.test, codebook.codewords, 1), [lists], [1])
    assert float(topk) == 1.0 and float(mass) == pytest.approx(1.0, abs=1e-6)


def test_lists_are_those_of_a_full_rebuild():
    layer = make_layer()
    codebook = fit_codebook(layer.fit, 16)
    reserved = reserved_slots(EXPERTS, 16, 8, TOPK)
    index = ShortlistIndex(EXPERTS, 16, 8, source="tokens", refresh_interval=20, num_reserved=reserved)
    index.refresh(codebook, layer.centers)
    (lists,) = make_lists(layer, codebook, [8])
    assert torch.equal(lists, index.shortlist)
    assert lists.unique().numel() == EXPERTS


def test_candidates_are_the_best_distinct_ones():
    layer = make_layer()
    codebook = fit_codebook(layer.fit, 8)
    lists = make_lists(layer, codebook, [8, 16])
    probes = assign(layer.test, codebook.codewords, 3)
    masses = recall_of_lists(layer, probes, lists, [1, 3], [TOPK, 10, 1000])[2]
    assert masses.shape == (3, 2, 2)
    for index, mass in numpy.ndenumerate(masses.numpy()):
        number, listed, num_probes = ([TOPK, 10, 1000][index[0]], lists[index[1]], [1, 3][index[2]])
        expected = 0.0
        for hidden, chosen in zip(layer.test, probes[:, :num_probes], strict=True):
            probs = (layer.centers.weight @ hidden).softmax(dim=0)[listed[chosen].long().unique()]
            expected += probs.sort(descending=True).values[:number].sum().item() / len(layer.test)
        assert mass == pytest.approx(expected, abs=1e-6)


def test_all_groups_find_everything_and_one_no_more_than_two():
    topk, mass = measure_groups(make_layer(bias=True), 8, [1, 2, 8])
    assert topk[0] <= topk[1] <= topk[2] == 1.0
    assert float(mass[2]) == pytest.approx(1.0, abs=1e-6)


def test_product_keys_find_everything_where_centers_are_pairs_of_sub_keys():
    halves = torch.randn(2, 8, HIDDEN // 2, generator=torch.Generator().manual_seed(3))
    ids = torch.arange(EXPERTS)
    first, second = ids // 8, (ids // 8 + ids) % 8  # all sub-keys stand where k-means starts, at every eighth id
    weight = torch.cat((halves[0, first], halves[1, second]), dim=1)
    layer = make_layer()
    assert measure_product_keys(Layer("1", layer.fit, layer.test, Centers(weight), TOPK), (8, 8))[0] == 1.0
    assert measure_product_keys(layer, (8, 8))[0] < 1.0


@pytest.mark.parametrize("router_type", ("air", "topk"))
def test_the_memory_is_that_of_a_routers_buffers_and_accumulators(megatron_cpu, router_type):
    sizes = dict(moe_air_num_clusters=16, moe_air_shortlist_size=8, moe_air_num_probes=2)
    router = make_router(megatron_cpu, moe_router_type="air", moe_router_input_norm="running", **sizes)
    learners = [router.codebook, router.input_norm]
    tensors = [*(one.statistics for one in learners), router.expert_load, router.logged_before[:-1]]
    tensors += [buffer for one in (*learners, router.index) for buffer in one.buffers()]
    config = air_config(make_config(moe_router_type=router_type, moe_router_input_norm="running"), Setting(16, 8, 2))
    assert sum(learned_bytes(config)[0].values()) == sum(tensor.nbytes for tensor in tensors)


# The tokens.

_APART = 10**6  # more than the tokens of a data set


@pytest.fixture
def collected(megatron_cpu, monkeypatch):
    """A function that collects the tokens of data sets of given lengths, and returns their ids: data set and position.

    In place of a model a router sees the ids.
    """
    router = make_router(megatron_cpu, moe_router_type="topk").eval()

    def forward_step(batches, model):
        tokens = next(batches)["tokens"].t()  # [S, B]
        model[0](tokens.unsqueeze(2).expand(-1, -1, HIDDEN).float())

    monkeypatch.setattr(capture, "forward_step", forward_step)

    def run(lengths, seq_length, num_fit, num_test, micro_batch_size=1):
        args = argparse.Namespace(
            seq_length=seq_length, micro_batch_size=micro_batch_size, reset_position_ids=False,
            reset_attention_mask=False, create_attention_mask_in_dataloader=False,
        )  # fmt: skip
        ids = [numpy.arange(length) + number * _APART for number, length in enumerate(lengths)]
        streams = [TokenStream(f"set {number}", tokens, None) for number, tokens in enumerate(ids)]
        data = [capture.split(stream, seq_length, num_fit, num_test) for stream in streams]
        (layer,) = capture.collect([torch.nn.ModuleList([router])], data, -1, args, num_fit, num_test)
        return [tokens[:, 0].long() for tokens in (layer.fit, layer.test)]

    return run


@pytest.mark.parametrize("seq_length", [3, 16, 64, 128])
def test_each_data_set_gives_equally_many_tokens(collected, seq_length):
    for num_fit, num_test in ((256, 32), (130, 65)):
        for ids, number in zip(
            collected([3000, 2000, 4000], seq_length, num_fit, num_test), (num_fit, num_test), strict=True
        ):
            counts = torch.bincount(ids // _APART, minlength=3)
            assert counts.sum() == number and counts.max() - counts.min() <= 1


@pytest.mark.parametrize("micro_batch_size", [1, 4])
@pytest.mark.parametrize(("num_fit", "num_test"), [(512, 64), (40, 40), (3, 9)])
def test_no_held_out_token_is_one_of_the_fit_and_none_counts_twice(collected, num_fit, num_test, micro_batch_size):
    seq_length = 8
    for length in range(2 * (seq_length + 1), 10 * seq_length + 8):
        fit, test = collected([length], seq_length, num_fit, num_test, micro_batch_size)
        assert 0 < len(fit) <= num_fit and 0 < len(test) <= num_test
        kept = torch.cat((fit, test))
        assert kept.unique().numel() == kept.numel()
        assert fit.max() < test.min() and test.max() < length


def test_data_too_short_for_fit_and_held_out_tokens_are_refused(collected):
    words = (
        r"'set 1' holds 17 tokens, and a window of --seq-length \(8\) to fit to and a held-out one take 18: give more"
    )
    with pytest.raises(ValueError, match=words):
        collected([100, 17], 8, 512, 64)


# The grid and the choice.


def test_every_setting_of_the_grid_is_valid_and_cheaper_than_exact_scores():
    config = make_config(num_moe_experts=1024, moe_router_type="air")
    settings = [one for chunk in grid(config).values() for one in chunk]
    assert len(settings) > 50 and automatic(config) in settings and len(set(settings)) == len(settings)
    for one in settings:
        assert not list(invalid(air_config(config, one)))
        assert one.num_clusters + one.num_probes * one.shortlist_size < 1024
    assert grid(make_config(num_moe_experts=16, moe_router_type="air")) == {}


def test_numbers_of_candidates_are_in_the_grid_of_a_mass_only():
    config = make_config(num_moe_experts=1024, moe_router_type="air")
    few, many = ([one for chunk in grid(config, metric).values() for one in chunk] for metric in ("topk", "mass"))
    assert {replace(one, num_candidates=0) for one in many} == set(few) and len(set(many)) == len(many) > 3 * len(few)
    for one in many:
        assert not list(invalid(air_config(config, one)))
    of_automatic = [one.num_candidates for one in many if replace(one, num_candidates=0) == automatic(config)]
    assert of_automatic == [TOPK, 16, 32, 64, 128, automatic(config).num_searched]
    biased = make_config(num_moe_experts=1024, moe_router_type="air", **WITH_BIAS)
    assert grid(biased, "mass") == grid(biased, "topk")


def test_a_config_of_another_router_keeps_experts_and_rebuilds():
    config = make_config(moe_router_type="air", moe_air_refresh_interval=7, moe_air_num_probes=2)
    changed = of_type(config, "topk")
    assert (changed.moe_router_type, changed.moe_granular_experts, changed.moe_air_num_probes) == ("topk", True, 0)
    assert air_config(config).moe_air_refresh_interval == 7
    assert config.moe_router_type == "air" and config.moe_air_num_probes == 2
    plain = TransformerConfig(num_layers=1, hidden_size=HIDDEN, num_attention_heads=2, num_moe_experts=EXPERTS)
    assert air_config(plain, Setting(16, 8, 1)).moe_air_num_clusters == 16


def results(*rows):
    return [
        Result("air", Setting(8, 8, number), flops, recalls, recalls) for number, (flops, recalls) in enumerate(rows)
    ]


def test_the_cheapest_that_reaches_the_target_in_every_layer_is_chosen():
    found = results((1.0, (0.5, 0.95)), (3.0, (0.92, 0.91)), (2.0, (0.9, 0.9)), (2.0, (0.9, 0.99)), (9.0, (1.0, 1.0)))
    assert cheapest(found, 0.9, "topk") is found[2]
    assert cheapest(found, 0.91, "topk") is found[1]
    assert cheapest(found[:1], 0.9, "topk") is None
    assert best(found, "mass") is found[4]
    assert frontier(found, "topk") == [found[0], found[2], found[1], found[4]]


def test_a_search_measures_every_setting_and_larger_ones_find_more():
    config, layers = make_config(moe_router_type="air"), [make_layer(), make_layer(num_fit=200)]
    ticks = []
    found = search(layers, config, 1.0, "topk", 512, 1e9, ticks.append)
    assert [one.setting for one in found.results] == [one for chunk in grid(config).values() for one in chunk]
    assert sum(ticks) == 2 * len(grid(config)) and not found.left_out
    by_setting = {one.setting: one for one in found.results}
    for one, result in by_setting.items():
        assert len(result.topk) == 2
        more = by_setting.get(Setting(one.num_clusters, one.shortlist_size, 2 * one.num_probes))
        if more is not None:
            assert more.recall("topk") >= result.recall("topk") and more.flops > result.flops


def test_a_search_leaves_out_what_costs_more_than_its_best_and_what_it_has_no_time_for():
    config, layers = make_config(moe_router_type="air"), [make_layer()]
    numbers = list(grid(config))
    assert len(numbers) > 1
    found = search(layers, config, 1e-9, "topk", None, 1e9)
    smaller = [number for number in numbers[1:] if number not in found.left_out]
    assert all(number < numbers[0] for number in smaller)
    assert all("costs more than the best" in found.left_out[number] for number in numbers if number > numbers[0])
    found = search(layers, config, 1.0, "topk", None, -1.0)
    assert list(found.left_out) == numbers[1:] and set(found.left_out.values()) == {"the time was up"}
    assert {one.setting.num_clusters for one in found.results} == {numbers[0]}


def test_a_search_leaves_out_codebooks_with_too_few_tokens_for_each_codeword():
    config = make_config(num_moe_experts=1024, moe_router_type="air")
    generator = torch.Generator().manual_seed(0)
    layer = replace(make_layer(num_fit=511), centers=Centers(torch.randn(1024, HIDDEN, generator=generator)))
    ticks = []
    found = search([layer], config, 1.0, "topk", 512, 1e9, ticks.append)
    assert {one.setting.num_clusters for one in found.results} == {32}
    assert found.left_out[64] == "their fit takes at least 512 tokens (--fit-tokens)"
    assert automatic(config).num_clusters in found.left_out
    assert sum(ticks) == len(grid(config))


def test_lists_of_the_checkpoint_are_measured_as_they_are(megatron_cpu):
    router = make_router(
        megatron_cpu, moe_router_type="air", moe_air_num_clusters=16, moe_air_shortlist_size=8, moe_air_num_probes=2
    )
    layer = make_layer()
    codebook = fit_codebook(layer.fit, 16)
    (lists,) = make_lists(layer, codebook, [8])
    loaded = replace(layer, codewords=codebook.codewords, lists=lists)
    (result,) = searching.measure_loaded([loaded], router.config, [router], "topk", 512)
    assert result.setting == Setting(16, 8, 2)
    assert result.topk[0] == pytest.approx(naive_recall(layer, assign(layer.test, codebook.codewords, 2), lists)[0])
    assert searching.measure_loaded([layer], router.config, [router], "topk", 512) == []


@pytest.mark.parametrize("fields", [{}, {"moe_air_num_candidates": 12}, {"moe_air_num_explored": 4}], ids=str)
def test_the_checkpoints_router_costs_what_its_config_says(megatron_cpu, fields):
    router = make_router(
        megatron_cpu, moe_router_type="air", moe_air_num_clusters=16, moe_air_shortlist_size=8, moe_air_num_probes=2,
        moe_router_load_balancing_type="aux_loss", moe_aux_loss_coeff=0.01, **{"moe_air_num_candidates": 8} | fields,
    )  # fmt: skip
    layer = make_layer()
    codebook = fit_codebook(layer.fit, 16)
    (lists,) = make_lists(layer, codebook, [8])
    loaded = replace(layer, codewords=codebook.codewords, lists=lists)
    on_gpu = torch.cuda.is_available()
    for metric in ("topk", "mass"):
        (result,) = searching.measure_loaded([loaded], router.config, [router], metric, 512)
        assert result.flops == AIRRouter.flops(router.config, Rebuilds(512, on_gpu=on_gpu)).total
        text = report(replace(measured([loaded], router.config, 0.9, metric), loaded=[result]))
        row = next(line for line in text.splitlines() if "AIR as in the checkpoint" in line).split()
        assert f"{result.flops / 1e3:.1f}" in row
        assert "that of the checkpoint has its own" in text
    assert row[5:9] == ["16", "8", "2", str(router.sizes.num_candidates)]
    probes = assign(layer.test, codebook.codewords, 2)
    expected = recall_of_lists(layer, probes, [lists], [2], [router.sizes.num_candidates])[2]
    assert result.mass == (pytest.approx(float(expected)),)


def test_other_structures_cost_what_their_formulas_say():
    config = make_config(moe_router_type="air", num_moe_experts=EXPERTS)
    groups, *_, keys = searching.measure_others([make_layer()], config)
    root = math.isqrt(EXPERTS)
    assert groups.name == f"groups: 1 of {root}" and groups.flops == 6 * HIDDEN * (root + root)
    assert keys.name == f"product keys: {root} x {root}" and keys.flops == 3 * HIDDEN * 2 * root
    config = make_config(moe_router_type="air", num_moe_experts=EXPERTS, moe_router_input_norm="whitening")
    whitened = searching.measure_others([make_layer()], config)
    for one, other in ((whitened[0], groups), (whitened[-1], keys)):
        assert one.flops - other.flops == 6 * HIDDEN**2


def test_structures_that_a_number_of_experts_does_not_divide_into_are_left_out():
    def names(num_experts):
        centers = Centers(torch.randn(num_experts, HIDDEN, generator=torch.Generator().manual_seed(0)))
        config = make_config(moe_router_type="air", num_moe_experts=num_experts)
        return [one.name for one in searching.measure_others([replace(make_layer(), centers=centers)], config)]

    assert names(97) == []
    assert names(2 * 31) == [*(f"groups: {number} of 31" for number in (1, 2, 4, 8, 16)), "product keys: 2 x 31"]


def test_the_times_are_those_of_scores_and_top_k_alone():
    layer = make_layer()
    codebook = fit_codebook(layer.fit, 8)
    (lists,) = make_lists(layer, codebook, [16])
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as profile:
        assert time_exact(layer) > 0 and time_search(layer, codebook.codewords, lists, 2) > 0
    names = {event.name for event in profile.events()}
    assert "aten::topk" in names and not [name for name in names if "softmax" in name]


# The report.

WITH_BIAS = dict(
    moe_router_enable_expert_bias=True, moe_router_score_function="sigmoid", moe_router_load_balancing_type="none"
)
BALANCED = dict(moe_router_load_balancing_type="aux_loss", moe_aux_loss_coeff=0.01)  # all candidates get gradients


def unlike_layers() -> list[Layer]:
    """Two layers. The first has the lower top-k recall, and more mass with a tight bound: one expert has most of it."""
    layer, bias = make_layer(), torch.zeros(EXPERTS)
    bias[0] = 8.0
    peaked = replace(layer, centers=Centers(0.1 * layer.centers.weight, bias))
    generator = torch.Generator().manual_seed(5)
    flat = replace(layer, name="2", centers=Centers(0.5 * torch.randn(EXPERTS, HIDDEN, generator=generator)))
    return [peaked, flat]


def measured(layers, config, target, metric) -> Measured:
    """A search, without the checkpoint's own lists and other structures."""
    return Measured(config, layers, 512, target, metric, search(layers, config, target, metric, 512, 1e9), [], [])


def rows_of_table(text: str) -> dict[str, dict[str, str]]:
    """The settings of AIR in a report: name -> column -> value."""
    heading, *lines = text.split("\n\n")[1].splitlines()
    columns = heading.replace("of exact", "of-exact").split()[1:]
    split = [(words[: -len(columns)], words[-len(columns) :]) for words in map(str.split, lines)]
    return {" ".join(name): dict(zip(columns, values, strict=True)) for name, values in split if name[:1] == ["AIR"]}


@pytest.mark.parametrize(
    ("metric", "words"),
    [
        ("topk", "0 in every layer"),
        ("mass", "No setting that was measured reaches a mass recall of 1.0 in every layer"),
    ],
)
def test_a_target_that_nothing_reaches_is_said_with_the_best_setting(metric, words):
    whole = measured([make_layer(num_test=9)], make_config(moe_router_type="air"), 1.0, metric)
    text, results = report(whole), whole.found.results
    shown = cheapest(results, 1.0, metric) or best(results, metric)
    assert words in text and f"  {shown.setting.flags()}\n" in text
    assert ("--moe-air-num-candidates " in text.split("--moe-air-num-probes")[1].splitlines()[0]) == (metric == "mass")


def test_what_a_run_needs_beside_the_printed_sizes_is_said():
    layers = [make_layer(num_test=9)]
    of_experts = make_config(moe_router_type="air", moe_air_codebook_source="experts")
    text = report(measured(layers, of_experts, 0.5, "topk"))
    assert " --moe-air-codebook-source tokens\n  the checkpoint's own lists" in text
    in_parts = make_config(moe_router_type="air", moe_air_list_parts=4)
    assert "--moe-air-list-parts 4 must divide" in report(measured(layers, in_parts, 0.5, "topk"))
    assert "--moe-air-codebook-source" not in report(measured(layers, make_config(moe_router_type="air"), 0.5, "topk"))


@pytest.mark.parametrize(("target", "num_candidates"), [(0.5, 4), (0.8, 16)])
def test_a_mass_costs_what_its_printed_candidates_cost(target, num_candidates):
    config, layers = make_config(moe_router_type="air", **BALANCED), unlike_layers()
    whole = measured(layers, config, target, "mass")
    text, chosen = report(whole), whole.chosen
    setting = chosen.setting
    assert setting.num_candidates == num_candidates
    assert f"--moe-air-num-probes {setting.num_probes} --moe-air-num-candidates {num_candidates}\n" in text
    assert chosen.flops == flops_of(air_config(config, setting), 512)
    for layer, mass in zip(layers, chosen.mass, strict=True):
        codebook = fit_codebook(layer.fit, setting.num_clusters)
        lists = make_lists(layer, codebook, [setting.shortlist_size])
        probes = assign(layer.test, codebook.codewords, setting.num_probes)
        expected = recall_of_lists(layer, probes, lists, [setting.num_probes], [num_candidates])[2]
        assert mass == pytest.approx(float(expected), abs=1e-6)
    row = rows_of_table(text)["AIR (chosen)"]
    assert (row["M"], row["mass"]) == (str(num_candidates), f"{min(chosen.mass):.3f}")
    assert row["kFLOPs"] == f"{chosen.flops / 1e3:.1f}"
    assert f"has {min(chosen.mass):.3f}, at 1/{whole.exact_flops / chosen.flops:.1f} of the FLOPs" in text
    assert "\nmass is that of the M candidates\n" in text


def test_no_cheaper_number_of_candidates_reaches_the_mass():
    config, layers = make_config(moe_router_type="air", **BALANCED), unlike_layers()
    chosen = measured(layers, config, 0.8, "mass").chosen
    every = measured(layers, config, 1.0, "mass").found.results
    assert min(chosen.mass) >= 0.8 and all(min(one.mass) < 0.8 for one in every if one.flops < chosen.flops)


def test_with_an_expert_bias_all_candidates_count_and_none_are_printed():
    config = make_config(moe_router_type="air", **WITH_BIAS)
    whole = measured([make_layer(expert_bias=True)], config, 0.5, "mass")
    text = report(whole)
    assert "--moe-air-num-candidates" not in text.partition("--moe-air-num-probes")[2].splitlines()[0]
    assert "M" not in rows_of_table(text)["AIR (chosen)"] and "\nmass is that of all listed experts\n" in text


@pytest.mark.parametrize("metric", ("topk", "mass"))
def test_a_bound_stands_beside_the_mass_of_the_same_layer_and_tokens(metric):
    whole = measured(unlike_layers(), make_config(moe_router_type="air", **BALANCED), 0.9, metric)
    text = report(whole)
    rows = rows_of_table(text)
    assert all(float(row["bound"]) <= float(row["listed"]) for row in rows.values())
    if metric == "topk":  # the layers that the columns are of differ
        assert any(float(row["bound"]) > float(row["mass"]) for row in rows.values())
    assert f"listed, bound, certified and us/token are those of layer {whole.worst_layer.name}, whose recall" in text
    assert "listed is the mass of all listed experts for 33 tokens, bound its proven lower bound\n" in text


def make_args(**changes) -> argparse.Namespace:
    given = dict(
        load="folder", data_path=["text"], world_size=1, num_experts=EXPERTS, moe_router_type="air", target_recall=0.9,
        target_metric="topk", time_limit=1.0, fit_tokens=1, test_tokens=1, batch_tokens=None, out_dir="out/tune",
    )  # fmt: skip
    return argparse.Namespace(**given | changes)


BAD = {
    "data": (dict(data_path=None), "--data-path must name the data"),
    "ranks": (dict(world_size=2), "the number of ranks (2) must be 1"),
    "dense": (dict(num_experts=None), "holds a model without experts"),
    "router": (dict(moe_router_type="hash"), "holds routers of type hash"),
    "recall": (dict(target_recall=1.5), "--target-recall (1.5) must be above 0 and at most 1"),
    "time": (dict(time_limit=0.0), "--time-limit (0.0) must be a positive number of seconds"),
    "tokens": (dict(fit_tokens=0), "--fit-tokens (0) must be at least 1"),
    "folder": (
        dict(out_dir="/dev/null/x"),
        "--out-dir '/dev/null/x' cannot be written: Not a directory in '/dev/null'",
    ),
}


@pytest.mark.parametrize(("changes", "words"), BAD.values(), ids=BAD)
def test_what_cannot_be_measured_is_refused_by_name(changes, words):
    check(make_args())
    with pytest.raises(ValueError) as error:
        check(make_args(**changes))
    assert words in str(error.value)


def test_a_model_of_few_experts_is_refused():
    with pytest.raises(ValueError, match=r"num_moe_experts \(16\) .* leaves no setting that costs less"):
        check_grid(make_config(num_moe_experts=16, moe_router_type="air"))


@pytest.mark.parametrize(("num_experts", "smallest"), [(EXPERTS, 8), (97, 16), (4096, 64)])
def test_too_few_tokens_for_the_smallest_codebook_are_refused(num_experts, smallest):
    config = make_config(num_moe_experts=num_experts, moe_router_type="air")
    check_grid(config)
    check_fit(config, 8 * smallest, "--fit-tokens")
    words = rf"--fit-tokens \({8 * smallest - 1}\) must be at least {8 * smallest}: .* has {smallest} codewords"
    with pytest.raises(ValueError, match=words):
        check_fit(config, 8 * smallest - 1, "--fit-tokens")
