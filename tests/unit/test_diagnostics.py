"""Diagnostics of one process: figures against their definitions, the files, and that nothing is paid without them."""

import argparse
import json
import logging
import math
import os
import random
from collections import Counter

import pytest
import torch

from air_moe_megatron.config import ROUTER_TYPES
from tests.builders import HIDDEN, VOCABULARY, make_layer, make_router, tell_ids

pytestmark = pytest.mark.usefixtures("megatron_cpu")

ARGUMENTS = dict(
    moe_air_diagnostics_interval=2, moe_router_type="air", moe_granular_experts=True, train_iters=5, log_interval=1,
    save=None, tensorboard_dir=None, skip_train=False, rank=0, world_size=1, global_batch_size=4, micro_batch_size=2,
    data_parallel_size=1, seq_length=10, consumed_train_samples=0, skipped_train_samples=0,
    decrease_batch_size_if_needed=False,
    tokenizer_type="NullTokenizer", tokenizer_model=None, vocab_size=VOCABULARY, padded_vocab_size=VOCABULARY, lr=0.1,
)  # fmt: skip


class Run:
    """Steps of Megatron's loop around the layers of a model, with what it would have set up."""

    def __init__(self, model, monkeypatch, **arguments):
        import megatron.training
        from megatron.core import num_microbatches_calculator

        from air_moe_megatron import step_hooks

        self.model, self.args, self.printed = model, argparse.Namespace(**ARGUMENTS | arguments), []
        monkeypatch.setattr(megatron.training, "get_args", lambda: self.args)
        monkeypatch.setattr(megatron.training, "print_rank_last", self.printed.append)
        monkeypatch.setattr(num_microbatches_calculator, "get_num_microbatches", lambda: 2)
        monkeypatch.setattr(step_hooks, "require_routers", lambda model: model)  # no GPT model, but layers alone

    def step(self, iteration, forward, attempts=1, successful=True, **results):
        from air_moe_megatron import step_hooks

        step_hooks.begin_step(self.model, iteration)
        for _ in range(attempts):
            step_hooks.discard_statistics(self.model)
            forward()
        step_hooks.finish_step(self.model, iteration, successful, **results)
        self.args.consumed_train_samples += self.args.global_batch_size


def lines_of(folder, kind=None):
    lines = [json.loads(line) for line in (folder / "air_diagnostics.jsonl").read_text().splitlines()]
    return [line for line in lines if kind in (None, line["kind"])]


# Figures.


def test_codeword_figures_worked_example():
    from air_moe_megatron.diagnostics.metrics import codeword_metrics

    loads = torch.tensor([2.0, 1.0, 1.0, 0.0])
    assert codeword_metrics(loads) == {"codeword_entropy": pytest.approx(0.75), "idle_codewords": 1}
    assert codeword_metrics(torch.ones(8))["codeword_entropy"] == pytest.approx(1.0)
    assert codeword_metrics(torch.tensor([3.0, 0.0]))["codeword_entropy"] == 0.0
    assert codeword_metrics(torch.zeros(4)) == {}
    assert codeword_metrics(torch.tensor([5.0])) == {"idle_codewords": 0}


def test_list_overlap_counts_entries_of_the_same_codeword():
    from air_moe_megatron.diagnostics.metrics import list_overlap

    assert list_overlap(torch.tensor([[0, 1], [2, 3]]), torch.tensor([[0, 5], [2, 3]])) == 0.75
    assert list_overlap(torch.tensor([[0, 1], [2, 3]]), torch.tensor([[2, 3], [0, 1]])) == 0.0
    assert list_overlap(torch.tensor([[4, 7, -1]]), torch.tensor([[7, 9, -1]])) == 0.5  # no expert is no entry
    generator = torch.Generator().manual_seed(0)
    before, now = ([torch.randperm(30, generator=generator)[:9].sort().values for _ in range(20)] for _ in range(2))
    kept = sum(len(set(a.tolist()) & set(b.tolist())) for a, b in zip(before, now, strict=True))
    assert list_overlap(torch.stack(before).int(), torch.stack(now).int()) == pytest.approx(kept / 180)


@pytest.mark.parametrize("num_experts", (1, 4, 64, 100, 257))
def test_load_bins_are_means_and_maxima_of_equal_ranges(num_experts):
    from air_moe_megatron.diagnostics.metrics import load_bins

    load = torch.randint(50, (num_experts,), generator=torch.Generator().manual_seed(0)) + 1
    means, largest = load_bins(load)
    ranges = {}
    for expert, tokens in enumerate(load.tolist()):
        ranges.setdefault(expert * min(64, num_experts) // num_experts, []).append(tokens)
    mean = sum(load.tolist()) / num_experts
    assert means == pytest.approx([sum(part) / len(part) / mean for part in ranges.values()])
    assert largest == pytest.approx([max(part) / mean for part in ranges.values()])
    assert len(means) == min(64, num_experts) and max(map(len, ranges.values())) - min(map(len, ranges.values())) <= 1
    assert load_bins(torch.zeros(num_experts)) == ([0.0] * len(means),) * 2


def test_most_frequent_ids_of_each_codeword():
    from air_moe_megatron.diagnostics.observation import CodewordCounter, most_frequent

    assert most_frequent(torch.tensor([1 << 32 | 7, -1, 1 << 32 | 7, 1 << 32 | 3]), 2) == [[], [[7, 2], [3, 1]]]
    assert most_frequent(torch.tensor([-1, -1]), 2) == [[], []]
    draw = random.Random(0)
    probes = torch.tensor([[draw.randrange(6), 0] for _ in range(300)])
    ids = torch.tensor([draw.randrange(20) for _ in range(300)])
    padding = torch.arange(300) % 7 == 0
    counter = CodewordCounter(6, 1000, torch.device("cpu"))
    counter.observe(probes, None, ids)
    counter.discard()
    for part in (slice(0, 120), slice(120, 300)):
        counter.observe(probes[part], padding[part], ids[part])
    counted = [(int(c), int(i)) for (c, _), i, out in zip(probes, ids, padding, strict=True) if not out]
    loads = Counter(codeword for codeword, _ in counted)
    assert counter.load.tolist() == [loads[codeword] for codeword in range(6)]
    for codeword, found in enumerate(most_frequent(counter.pairs, 6)):
        tokens = Counter(token for one, token in counted if one == codeword)
        assert found == [list(pair) for pair in sorted(tokens.items(), key=lambda pair: (-pair[1], pair[0]))[:5]]


def test_a_counter_keeps_the_ids_that_fit_and_counts_all_tokens():
    from air_moe_megatron.diagnostics.observation import CodewordCounter

    counter = CodewordCounter(2, 3, torch.device("cpu"))
    for _ in range(2):
        counter.observe(torch.tensor([[0], [1]]), None, torch.tensor([5, 6]))
    counter.observe(torch.zeros(0, 1, dtype=torch.int64), None, torch.zeros(0, dtype=torch.int64))
    counter.observe(torch.tensor([[1]]), None, None)  # ids that are not at hand
    assert counter.pairs.tolist() == [5, 1 << 32 | 6, 5]
    assert counter.load.tolist() == [2, 3]


def test_the_plane_is_that_of_the_first_two_components_and_draws_no_random_numbers():
    from air_moe_megatron.diagnostics.snapshot import principal_plane

    generator = torch.Generator().manual_seed(0)
    codewords = torch.randn(40, 12, generator=generator) * torch.linspace(3.0, 0.3, 12)
    state = torch.get_rng_state()
    plane = principal_plane(codewords)
    assert torch.equal(torch.get_rng_state(), state)
    u, s, _ = torch.linalg.svd(codewords - codewords.mean(dim=0), full_matrices=False)
    torch.testing.assert_close(plane.abs(), (u * s)[:, :2].abs(), rtol=1e-3, atol=1e-3)
    assert (plane.gather(0, plane.abs().argmax(dim=0, keepdim=True)) > 0).all()
    assert principal_plane(codewords[:1]).tolist() == [[0.0, 0.0]]
    assert principal_plane(codewords[:, :1]).shape == (40, 2)


def test_recall_of_a_codeword_is_a_running_mean_that_forgets():
    from air_moe_megatron.diagnostics.snapshot import CodewordRecall

    recall = CodewordRecall(3)
    recall.add(torch.tensor([[1.5, 0.0, 0.0], [2.0, 0.0, 1.0]]).double())
    assert recall.means() == [0.75, None, 0.0]
    recall.add(torch.tensor([[1.0, 0.0, 0.0], [1.0, 0.0, 0.0]]).double())
    assert recall.means() == [pytest.approx((0.9 * 1.5 + 1.0) / (0.9 * 2.0 + 1.0)), None, 0.0]


# The whole way of a process, for every router type.


def forward_of(layers, seed, ids):
    """Two microbatches [S, B, H] of each layer; the routes of a step are collected by a hook on its router."""
    generator = torch.Generator().manual_seed(seed)

    def forward():
        for _ in range(2):
            for layer in layers:
                layer(torch.randn(10, 2, HIDDEN, generator=generator))

    for layer in layers:
        tell_ids(layer.router, ids)
    return forward


@pytest.mark.parametrize("router_type", ROUTER_TYPES)
def test_every_router_type_writes_the_figures_that_it_has(megatron_cpu, monkeypatch, tmp_path, router_type):
    layer = make_layer(megatron_cpu, moe_router_type=router_type)
    ids = torch.arange(20).view(2, 10)
    run = Run([torch.nn.ModuleList([layer])], monkeypatch, save=str(tmp_path / "new"), log_interval=3)
    loads = torch.zeros(layer.router.num_experts)

    def count(module, args, out):
        loads.add_(torch.bincount(out[1][out[1] >= 0], minlength=64))

    layer.router.register_forward_hook(count)
    for iteration in range(1, 6):
        run.step(iteration, forward_of([layer], iteration, ids), losses={"lm loss": torch.tensor([1.0 * iteration])})
        if iteration == 2:
            first = loads.clone()
            loads.zero_()
        elif iteration == 4:
            second = loads.clone()
    start, *lines = lines_of(tmp_path / "new")
    assert [(line["kind"], line["iteration"]) for line in lines] == [
        ("diagnostics", 2), ("step", 3), ("diagnostics", 4), ("diagnostics", 5)
    ]  # fmt: skip
    assert lines[1]["loss"] == 2.0 and lines[1]["tokens"] == 120 and "grad_norm" not in lines[1]
    assert start["layers"][0]["router"] == router_type and start["arguments"]["lr"] == 0.1
    # Tokens count from one diagnostics to the next, whenever health lines come: here in steps 1 and 3.
    for line, load in ((lines[0], first), (lines[2], second)):
        (figures,) = line["layers"]
        assert figures["experts_used"] == pytest.approx(float((load > 0).float().mean()))
        assert figures["imbalance_factor"] == pytest.approx(float(64 * load.square().sum() / load.sum() ** 2), rel=1e-5)
        assert figures["load_bins"] == pytest.approx((load / load.mean()).tolist(), rel=1e-5)
        assert 0.0 < figures["routing_seconds"] == pytest.approx(line["routing_seconds"])
        assert ("topk_recall" in figures) == ("codeword_entropy" in figures) == (router_type == "air")
    assert (tmp_path / "new" / "air_codebook.json").exists() == (router_type == "air")
    if router_type == "hash":
        assert start["layers"][0]["router_flops_per_token"] == 0


def test_figures_of_air_against_the_sample_and_the_routes(megatron_cpu, monkeypatch, tmp_path):
    from air_moe_megatron.diagnostics import recall

    layer = make_layer(megatron_cpu, moe_router_type="air", moe_air_num_clusters=8, moe_air_shortlist_size=12)
    router, seen, samples = layer.router, [], []
    original = recall.measure

    def measure(router):
        samples.append(original(router))
        return samples[-1]

    monkeypatch.setattr("air_moe_megatron.diagnostics.metrics.measure", measure)
    route = router.route
    monkeypatch.setattr(router, "route", lambda *args: seen.append(route(*args)) or seen[-1])
    run = Run([torch.nn.ModuleList([layer])], monkeypatch, save=str(tmp_path))
    lists = []
    for iteration in range(1, 5):
        seen.clear()
        run.step(iteration, forward_of([layer], iteration, None))
        if iteration % 2 == 0:
            lists.append(router.index.shortlist.tolist())
    (figures,) = lines_of(tmp_path, "diagnostics")[-1]["layers"]
    sample = samples[-1]
    for name in ("mass_recall", "paper_bound", "mass_bound", "certified", "topk_recall"):
        assert figures[name] == pytest.approx(float(getattr(sample, name).float().mean()), rel=1e-4)
    nearest = torch.cat([routes.probed[:, 0] for routes in seen])
    load = torch.bincount(nearest, minlength=8).double()
    shares = load[load > 0] / 40
    assert figures["codeword_entropy"] == pytest.approx(float(-(shares * shares.log()).sum()) / math.log(8), rel=1e-5)
    assert figures["idle_codewords"] == int((load == 0).sum())
    same = sum(len(set(a) & set(b)) for a, b in zip(*lists, strict=True))
    assert figures["list_overlap"] == pytest.approx(same / (8 * 12), rel=1e-5)
    assert figures["experts_listed"] == pytest.approx(len({expert for row in lists[1] for expert in row}) / 64)
    assert figures["quantization_error"] == pytest.approx(router.codebook.health().quantization_error, rel=1e-5)
    (snapshot,) = json.loads((tmp_path / "air_codebook.json").read_text())["layers"]
    assert snapshot["load"] == load.tolist() and "tokens" not in snapshot
    sums = torch.zeros(2, 8).double()
    for found in samples:
        sums *= 0.9
        for codeword, value in zip(found.probed[:, 0], found.topk_recall, strict=True):
            sums[:, codeword] += torch.tensor([float(value), 1.0])
    expected = [total / count if count else None for total, count in sums.t().tolist()]
    assert snapshot["recall"] == pytest.approx(expected, rel=1e-4)


def test_scalars_of_a_layer_are_spelled_as_those_of_the_health_line(megatron_cpu, monkeypatch):
    from air_moe_megatron.diagnostics.health import ITEMS

    layer = make_layer(megatron_cpu, moe_router_type="air", moe_air_num_clusters=8, moe_air_shortlist_size=12)
    run, written = Run([torch.nn.ModuleList([layer])], monkeypatch, moe_air_diagnostics_interval=1), {}
    monkeypatch.setattr(
        "air_moe_megatron.diagnostics.write_scalars", lambda scalars, prefix, _: written.update({prefix: scalars})
    )
    run.step(1, forward_of([layer], 1, None))
    shared = {"mass-recall", "top-k-recall", "quantization-error", "experts-listed", "experts-used"}
    assert shared <= written["air/layer_1"].keys() & {item.key for item in ITEMS}
    assert not any("topk" in name or "_" in name for name in written["air/layer_1"])


def test_a_frozen_router_and_a_repeated_or_skipped_step_are_measured(megatron_cpu, monkeypatch, tmp_path):
    layer = make_layer(megatron_cpu, moe_router_type="air", moe_air_num_clusters=8, moe_air_shortlist_size=12)
    layer.router.requires_grad_(False)
    run = Run([torch.nn.ModuleList([layer])], monkeypatch, save=str(tmp_path), moe_air_diagnostics_interval=1)
    run.step(1, forward_of([layer], 1, None), attempts=3)
    run.step(2, forward_of([layer], 2, None), successful=False, losses={"lm loss": torch.tensor(9.0)})
    run.step(3, forward_of([layer], 3, None), losses={"lm loss": torch.tensor(math.nan)}, grad_norm=math.inf)
    for line in lines_of(tmp_path, "diagnostics"):
        (figures,) = line["layers"]
        assert 0.0 < figures["topk_recall"] <= 1.0 and "quantization_error" not in figures
    snapshot = json.loads((tmp_path / "air_codebook.json").read_text())
    assert sum(snapshot["layers"][0]["load"]) == 40
    for step in lines_of(tmp_path, "step"):
        assert "loss" not in step and "grad_norm" not in step  # no number that is not finite


def test_a_measurement_that_is_skipped_is_made_in_the_next_step(megatron_cpu, monkeypatch, tmp_path):
    """With --iterations-to-skip Megatron reads batches, counts them, and calls nothing of ours."""
    layer = make_layer(megatron_cpu, moe_router_type="air", moe_air_num_clusters=8, moe_air_shortlist_size=12)
    chunk, folder = torch.nn.ModuleList([layer]), str(tmp_path)
    run = Run([chunk], monkeypatch, save=folder, moe_air_diagnostics_interval=3, train_iters=8)
    for iteration in (1, 2, 4, 5, 7):  # 3 and 6 are skipped
        run.args.consumed_train_samples = (iteration - 1) * run.args.global_batch_size
        run.args.skipped_train_samples = iteration // 3 * run.args.global_batch_size
        run.step(iteration, forward_of([layer], iteration, None))
    found = lines_of(tmp_path, "diagnostics")
    assert [(line["iteration"], line["tokens"]) for line in found] == [(4, 3 * 40), (7, 5 * 40)]


def test_tokens_of_a_batch_are_those_that_run(megatron_cpu, monkeypatch, tmp_path):
    """Megatron counts as skipped what it leaves out of a batch, and with a schedule the flag is one microbatch."""
    layer = make_layer(megatron_cpu, moe_router_type="air", moe_air_num_clusters=8, moe_air_shortlist_size=12)
    flops = {}
    for name, arguments in {
        "plain": {},
        "decreased": dict(global_batch_size=5, decrease_batch_size_if_needed=True),
        "schedule": dict(global_batch_size=2, step_batch_size_schedule="0:4"),
    }.items():
        chunk = torch.nn.ModuleList([layer])
        run = Run([chunk], monkeypatch, save=str(tmp_path / name), train_iters=4, **arguments)
        for iteration in range(1, 5):
            run.args.consumed_train_samples = 4 * (iteration - 1)
            run.args.skipped_train_samples = (iteration - 1) * (name == "decreased")
            run.step(iteration, forward_of([layer], iteration, None))
        assert [line["tokens"] for line in lines_of(tmp_path / name, "step")] == [40, 80, 120, 160]
        flops[name] = lines_of(tmp_path / name, "run")[0]["layers"][0]["router_flops_per_token"]
    assert flops["plain"] == flops["decreased"] == flops["schedule"]


def test_bytes_of_a_token_are_those_of_one_attempt_in_skipped_steps_too(megatron_cpu, monkeypatch):
    layer = make_layer(megatron_cpu, moe_router_type="air", moe_air_num_clusters=8, moe_air_shortlist_size=12)
    run = Run([torch.nn.ModuleList([layer])], monkeypatch, log_interval=4, moe_air_diagnostics_interval=0)
    for iteration, attempts, successful in ((1, 2, True), (2, 3, True), (3, 2, False), (4, 1, True)):
        run.step(iteration, forward_of([layer], iteration, None), attempts, successful)
    assert len(run.printed) == 2  # after the first step, and of the three others
    assert all(f"dispatched bytes per token: {4 * HIDDEN} (" in line for line in run.printed)


def test_a_model_without_tokens_or_routers_is_no_error(megatron_cpu, monkeypatch, tmp_path):
    layer = make_layer(megatron_cpu, moe_router_type="air", moe_air_num_clusters=8, moe_air_shortlist_size=12)
    run = Run([torch.nn.ModuleList([layer])], monkeypatch, save=str(tmp_path), moe_air_diagnostics_interval=1)
    run.step(1, lambda: layer(torch.zeros(0, 2, HIDDEN)))
    (line,) = lines_of(tmp_path, "diagnostics")
    assert not {"topk_recall", "codeword_entropy", "idle_codewords"} & line["layers"][0].keys()
    assert line["layers"][0]["load_bins"] == [0.0] * 64
    run = Run([torch.nn.Linear(1, 1)], monkeypatch, save=str(tmp_path / "dense"), moe_air_diagnostics_interval=1)
    run.step(1, lambda: None, losses={"lm loss": torch.tensor(2.0)})
    assert [line["kind"] for line in lines_of(tmp_path / "dense")] == ["run", "step", "diagnostics"]


def test_token_ids_come_from_the_embedding_in_measured_steps_only(megatron_cpu, monkeypatch, tmp_path):
    layer = make_layer(megatron_cpu, moe_router_type="air", moe_air_num_clusters=8, moe_air_shortlist_size=12)
    model = torch.nn.ModuleDict({"embedding": torch.nn.Embedding(VOCABULARY, HIDDEN), "layer": layer})
    run, seen, pairs = Run([model], monkeypatch, save=str(tmp_path)), [], []
    route = layer.router.route
    monkeypatch.setattr(layer.router, "route", lambda *args: seen.append(route(*args)) or seen[-1])

    def forward():
        for _ in range(2):
            ids = torch.randint(VOCABULARY, (2, 10))
            layer(model["embedding"](ids).transpose(0, 1))
            pairs.extend(zip(seen[-1].probed[:, 0].tolist(), ids.t().flatten().tolist(), strict=True))

    run.step(1, forward)
    assert layer.router.observer is None and not model["embedding"]._forward_pre_hooks
    pairs.clear()
    run.step(2, forward)
    assert not model["embedding"]._forward_pre_hooks and not layer.router._forward_pre_hooks
    (snapshot,) = json.loads((tmp_path / "air_codebook.json").read_text())["layers"]
    for codeword, found in enumerate(snapshot["tokens"]):
        tokens = Counter(token for one, token in pairs if one == codeword)
        assert found == [list(pair) for pair in sorted(tokens.items(), key=lambda pair: (-pair[1], pair[0]))[:5]]


def test_off_and_between_two_measurements_nothing_is_paid(megatron_cpu, monkeypatch, tmp_path):
    counts = Counter()
    for name in ("all_reduce", "all_gather_object", "gather"):
        original = getattr(torch.distributed, name)

        def counted(*args, name=name, original=original, **kwargs):
            counts[name] += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(torch.distributed, name, counted)
    for interval in (0, 3):
        layer = make_layer(megatron_cpu, moe_router_type="air", moe_air_diagnostics_interval=interval)
        folder = tmp_path / str(interval)
        run = Run(
            [torch.nn.ModuleList([layer])], monkeypatch, save=str(folder), log_interval=1000,
            moe_air_diagnostics_interval=interval, train_iters=9,
        )  # fmt: skip
        taken = []
        monkeypatch.setattr("air_moe_megatron.routers.air._take_sample", lambda *args, taken=taken: taken.append(1))
        for iteration in (4, 5):
            counts.clear()
            run.step(iteration, forward_of([layer], iteration, None))
            assert not taken and not counts and layer.router.sample is None
            assert not layer.router._forward_hooks and layer.router.observer is None
        assert folder.exists() == bool(interval)
        assert not interval or [line["kind"] for line in lines_of(folder)] == ["run"]


# The files.


def test_a_disk_that_fails_ends_the_writing_with_one_warning(tmp_path, caplog):
    from air_moe_megatron.diagnostics.files import RunFiles

    (tmp_path / "air_diagnostics.jsonl").symlink_to("/dev/full")
    files = RunFiles(str(tmp_path))
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            files.append({"kind": "step"})
            files.replace_snapshot({"iteration": 1})
    assert [record.getMessage() for record in caplog.records] == [
        f"diagnostics are no longer written to '{tmp_path}': [Errno 28] No space left on device; the training goes on"
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["air_diagnostics.jsonl"]


def test_a_training_goes_on_without_its_file(megatron_cpu, monkeypatch, tmp_path, caplog):
    layer = make_layer(megatron_cpu, moe_router_type="air")
    (tmp_path / "file").touch()
    run = Run([torch.nn.ModuleList([layer])], monkeypatch, save=str(tmp_path / "file" / "run"))
    for iteration in (1, 2):
        run.step(iteration, forward_of([layer], iteration, None))
    assert len(caplog.records) == 1 and "no longer written" in caplog.text
    assert "top-k recall" in run.printed[-1]


def test_where_the_file_goes_is_said_at_the_start(megatron_cpu, monkeypatch, tmp_path):
    layer = make_layer(megatron_cpu, moe_router_type="air")
    for given, words in (
        ({"save": str(tmp_path / "a"), "tensorboard_dir": str(tmp_path / "b")}, f"'{tmp_path}/a/air_diagnostics.jsonl"),
        ({"save": "msc://bucket/a", "tensorboard_dir": str(tmp_path / "b")}, f"'{tmp_path}/b/air_diagnostics.jsonl'"),
        ({}, "into no file: neither --save nor --tensorboard-dir"),
    ):
        run = Run([torch.nn.ModuleList([layer])], monkeypatch, **given)
        run.step(1, forward_of([layer], 1, None))
        assert words in run.printed[0]
        assert [path.name for path in tmp_path.iterdir()] == ([words.split("/")[-2]] if given else [])
        for folder in tmp_path.iterdir():
            (folder / "air_diagnostics.jsonl").unlink()
            folder.rmdir()


def test_a_half_written_line_is_not_continued(tmp_path):
    from air_moe_megatron.diagnostics.files import RunFiles

    path = tmp_path / "air_diagnostics.jsonl"
    path.write_text('{"kind": "step", "itera')
    RunFiles(str(tmp_path)).append({"kind": "run"})
    assert path.read_text() == '{"kind": "step", "itera\n{"kind": "run"}\n'


def test_numbers_are_short_and_finite():
    from air_moe_megatron.diagnostics.files import rounded

    given = {"a": 1 / 3, "time": 1700000000.125, "b": math.nan, "c": [math.inf, 2, None], "d": None, "e": (True, "x")}
    assert rounded(given) == {"a": 0.333333, "time": 1700000000.125, "c": [None, 2, None], "d": None, "e": [True, "x"]}


def test_what_cannot_be_written_is_said_before_the_start(tmp_path):
    from air_moe_megatron.diagnostics.files import diagnostics_write_problem

    def problem(**given):
        return diagnostics_write_problem(argparse.Namespace(**ARGUMENTS | given))

    blocked = str(tmp_path / "run")
    (tmp_path / "run" / "air_diagnostics.jsonl").mkdir(parents=True)
    message = f"--tensorboard-dir '{blocked}': the diagnostics '{blocked}/air_diagnostics.jsonl' cannot be written: "
    assert problem(tensorboard_dir=blocked) == (
        message + "Is a directory; choose another folder, or add --moe-air-diagnostics-interval 0"
    )
    for other in (dict(moe_air_diagnostics_interval=0), dict(world_size=2), dict(skip_train=True)):
        assert problem(tensorboard_dir=blocked, **other) is None
    assert problem(tensorboard_dir=blocked, moe_router_type="topk", moe_granular_experts=False) is None
    assert problem() is None and problem(tensorboard_dir=str(tmp_path / "new")) is None
    (tmp_path / "air_diagnostics.jsonl").mkdir()
    assert "--save" in problem(save=str(tmp_path)) and "Is a directory" in problem(save=str(tmp_path))
    assert sorted(os.listdir(tmp_path)) == ["air_diagnostics.jsonl", "run"]


# The flag.


def test_the_interval_is_for_every_router_of_ours():
    from air_moe_megatron.config import raise_first, unused
    from tests.builders import make_config

    for router_type in ROUTER_TYPES:
        config = make_config(moe_router_type=router_type, moe_air_diagnostics_interval=7)
        raise_first(unused(config))
    with pytest.raises(ValueError, match=r"moe_air_diagnostics_interval \(-1\) must be a number of steps, or 0 to"):
        make_config(moe_air_diagnostics_interval=-1)
    config.moe_router_type, config.moe_granular_experts, config.moe_dispatch = "topk", False, "stock"
    with pytest.raises(
        ValueError, match=r"--moe-air-diagnostics-interval \(7\) has no effect .* --moe-granular-experts"
    ):
        raise_first(unused(config))
    config.moe_air_diagnostics_interval = 0
    raise_first(unused(config))


def test_a_router_outside_of_a_training_loop_keeps_its_sample(megatron_cpu):
    router = make_router(megatron_cpu, moe_router_type="air")
    router.route(torch.randn(5, HIDDEN))
    assert router.sample.hidden.shape == (5, HIDDEN)
    router = make_router(megatron_cpu, moe_router_type="air", moe_air_diagnostics_interval=0)
    router.route(torch.randn(5, HIDDEN))
    assert router.sample is None


@pytest.mark.parametrize("batch_size", (1, 2, 3, 4, 8, 64))
@pytest.mark.parametrize("length", (1, 16, 128, 1000))
def test_a_sample_has_tokens_of_all_sequences_alike(length, batch_size):
    from air_moe_megatron.routers.air import sample_step

    num_tokens = length * batch_size
    sampled = torch.arange(0, num_tokens, sample_step(num_tokens, batch_size))
    counts = torch.bincount(sampled % batch_size, minlength=batch_size)  # tokens [S, B] are flattened
    assert min(num_tokens, 21) <= sampled.numel() <= 64
    assert counts.max() - counts.min() <= 1
