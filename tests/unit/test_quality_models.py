"""What the quality study measures on models in its own process: step times, drift, context, copying."""

import math

import numpy
import pandas
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from benchmarks.quality import copying, study


def test_steps_of_every_variant_are_timed_in_turn_on_the_data_of_the_study(tmp_path, megatron_cpu):
    from benchmarks.quality import in_process, step_time

    builder = IndexedDatasetBuilder(str(tmp_path / "train.bin"), dtype=numpy.uint16)
    builder.add_document(numpy.arange(200) % 50, [200])
    builder.finalize(str(tmp_path / "train.idx"))
    flags = {
        "num-layers": 1, "hidden-size": 8, "num-attention-heads": 2, "seq-length": 4, "global-batch-size": 2,
        "train-iters": 10, "position-embedding-type": "rope", "disable-bias-linear": True,
        "moe-granular-experts": True, "moe-dispatch": "compact", "moe-router-dtype": "fp32",
    }  # fmt: skip
    names = ("topk", "air", "hash")
    config = {
        "corpus": "stdlib",
        "vocabulary": 50,
        "seeds": [1],
        "flags": flags,
        "variants": {n: {"moe-router-type": n} for n in names},
    }
    config["runs"] = [{"experts": [64], "shapes": [[4, 1]], "variants": list(names)}]
    runs, device = in_process.models(config, 64), torch.device("cpu")
    batches = in_process.batches(tmp_path / "train", flags, device)
    assert len(batches) == 20 and batches[1]["tokens"].tolist()[0] == [10, 11, 12, 13]
    assert (batches[0]["labels"][:, :-1] == batches[0]["tokens"][:, 1:]).all()
    trainers = {name: in_process.trainer_of(run, megatron_cpu, device) for name, run in runs.items()}
    assert [router.router_type for trainer in trainers.values() for router in trainer.routers] == list(names)
    seconds = step_time.time_steps(trainers, batches, warmup=2, repetitions=3)
    rows = step_time.rows_of(runs, seconds, 2, device)
    assert [row["variant"] for row in rows] == list(names) and rows[0]["of_topk"] == 1.0
    assert all(row["repetitions"] == 3 and row["step_ms"] > 0 for row in rows)
    with pytest.raises(ValueError, match=r"--experts \(32\) must be a size of the study"):
        in_process.models(config, 32)


def test_every_rule_of_the_drift_study_does_what_it_says(tmp_path, megatron_cpu):
    from benchmarks.quality import drift, in_process

    flags = {
        "num-layers": 1, "hidden-size": 8, "num-attention-heads": 2, "seq-length": 4, "global-batch-size": 2,
        "train-iters": 10, "position-embedding-type": "rope", "disable-bias-linear": True,
        "moe-granular-experts": True, "moe-dispatch": "compact", "moe-router-dtype": "fp32",
        "attention-dropout": 0, "hidden-dropout": 0,
        "moe-router-type": "air", "num-experts": 64, "moe-router-topk": 4, "moe-ffn-hidden-size": 1,
    }  # fmt: skip
    run = study.Run("air", 64, 4, 1, 1, "wikitext-2", 50, flags)
    device = torch.device("cpu")
    text = torch.arange(25 * 2 * 5).remainder(50).view(25, 2, 5)
    positions, mask = torch.arange(4).expand(2, 4), torch.ones(1, 1, 4, 4, dtype=torch.bool).triu(1)
    data = [{"tokens": b[:, :-1], "labels": b[:, 1:], "positions": positions, "mask": mask} for b in text]
    rows = pandas.DataFrame(drift.rows_of_seed(run, data, data[:12], 1, megatron_cpu, device))
    after = {name: rows[rows.rule == name] for name in drift.RULES}
    assert (rows.rule == "before").sum() == 25 and all(len(part) == 12 for part in after.values())
    first = {part.loss.iloc[0] for part in after.values()}
    assert len(first) == 1  # all go on from one state
    assert after["as it is"].age.tolist() == list(range(26, 38))
    assert after["reset"].age.tolist() == list(range(9, 21))
    assert len({part.quantization_error.iloc[-1] for part in after.values()}) >= 3  # 'drift' may do nothing
    assert drift.table(rows).count("\n") == 1 + len(drift.RULES)
    router = in_process.trainer_of(run, megatron_cpu, device).routers[0]
    frozen = drift.Rule("frozen", router, 400)
    frozen.begin()
    assert router.codebook.learn is not type(router.codebook).learn
    frozen.end()
    assert router.codebook.learn is type(router.codebook).learn
    rule = drift.Rule("drift", router, 400, [0.1, 0.2] * 10)
    rule.begin()
    assert (router.codebook.decay, router.index.refresh_interval) == (0.99, 20)
    router.codebook.last_health.copy_(torch.tensor([0.1, 8.0]))  # an error of 0.9
    rule.after_step()
    assert rule.age == 40 and router.codebook.decay == 41 / 43
    rule.after_step()
    assert rule.age == 8 and router.codebook.decay == 9 / 11
    for _ in range(10):
        rule.after_step()  # such errors are soon no longer unusual
    assert rule.age > 8
    rule.end()
    assert (router.codebook.decay, router.index.refresh_interval) == (0.99, 20)


def test_information_is_one_where_the_id_fixes_the_expert_and_none_where_it_tells_nothing():
    from benchmarks.quality.context import Counts

    ids = torch.arange(2).repeat(50_000)
    one, none = Counts(2, 2), Counts(2, 2)
    one.add(ids, ids.unsqueeze(1), torch.ones(100_000, 1))
    none.add(ids, torch.arange(2).repeat_interleave(50_000).unsqueeze(1), torch.ones(100_000, 1))
    assert one.information(1) == pytest.approx(1.0, abs=1e-4) and none.information(1) == pytest.approx(0.0, abs=1e-4)


def test_the_most_frequent_experts_of_an_id_come_with_their_mean_probs():
    from benchmarks.quality.context import Counts

    counts = Counts(2, 4)
    topk_ids = torch.tensor([[0, 1], [0, 2], [0, 2], [3, 1]], dtype=torch.int32)
    counts.add(torch.tensor([1, 1, 1, 0]), topk_ids, torch.tensor([[0.5, 0.5], [0.2, 0.8], [0.2, 0.4], [0.7, 0.3]]))
    experts, probs = counts.most_frequent(2)
    assert experts[1].tolist() == [0, 2] and sorted(experts[0].tolist()) == [1, 3]
    assert probs[1].tolist() == pytest.approx([0.3, 0.6])


def test_a_layer_that_routes_by_the_id_loses_nothing_without_context(megatron_cpu):
    """Of two layers the first is by hash: its table comes back from the counts, and its loss stays."""
    from benchmarks.quality import context, in_process

    flags = {
        "num-layers": 2, "hidden-size": 8, "num-attention-heads": 2, "seq-length": 8, "global-batch-size": 4,
        "train-iters": 4, "position-embedding-type": "rope", "disable-bias-linear": True,
        "moe-granular-experts": True, "moe-dispatch": "compact", "moe-router-dtype": "fp32",
        "attention-dropout": 0, "hidden-dropout": 0, "moe-num-hash-layers": 1,
        "moe-router-type": "air", "num-experts": 64, "moe-router-topk": 4, "moe-ffn-hidden-size": 1,
    }  # fmt: skip
    run = study.Run("hash-air", 64, 4, 1, 1, "stdlib", 50, flags)
    text = torch.arange(60 * 4 * 9).mul(7).remainder(47).view(60, 4, 9)
    positions, mask = torch.arange(8).expand(4, 8), torch.ones(1, 1, 8, 8, dtype=torch.bool).triu(1)
    data = [{"tokens": b[:, :-1], "labels": b[:, 1:], "positions": positions, "mask": mask} for b in text]
    batches = context.shuffled(data, 1)
    assert len(batches) == 60 and batches[0]["tokens"].shape == (4, 8)
    assert sum(int(batch["labels"].sum()) for batch in batches) == sum(int(batch["labels"].sum()) for batch in data)
    trainer = in_process.trainer_of(run, megatron_cpu, torch.device("cpu"))
    by_id, in_context = context.rows_of(trainer, batches[:30], batches[30:50], batches[50:], 50, "hash-air")
    assert by_id["fixed_by_id"] == 1.0 and by_id["rise_alone"] == pytest.approx(0.0, abs=1e-6)
    assert by_id["information"] == pytest.approx(1.0, abs=0.03) and in_context["information"] < by_id["information"]
    assert 0.0 < in_context["fixed_by_id"] < 1.0 and in_context["rise_alone"] != 0.0
    assert in_context["rise_with_earlier"] == pytest.approx(in_context["rise_alone"], abs=1e-6)
    assert "| hash-air | 1 | 100.0% |" in context.table(pandas.DataFrame([by_id, in_context]))


class Copier(torch.nn.Module):
    """Knows a token, at 1 bit, where the token before has occurred in the sequence, and else takes 8 bits."""

    def forward(self, tokens, positions, mask, labels):
        seen = (tokens.unsqueeze(2) == tokens.unsqueeze(1)).tril(-1).any(dim=2)
        return math.log(2) * torch.where(seen, 1.0, 8.0)


def test_a_model_that_copies_pays_for_a_passage_once():
    tokens = torch.randperm(4 * 12, generator=torch.Generator().manual_seed(1)).view(4, 12)
    batch = {"tokens": tokens, "labels": tokens + 1, "positions": None, "mask": None}
    assert (copying.twice(batch)["tokens"][:, 6:] == tokens[:, :6]).all()
    assert (copying.twice(batch)["labels"] == copying.twice(batch)["tokens"].roll(-1, dims=1)).all()
    batch["tokens"][:, 6:9] = batch["tokens"][:, :3]
    figures = copying.measure(Copier(), [batch])
    assert figures == pytest.approx(
        {
            "loss": 8.0 - 7.0 * 3 / 12, "where_seen": 1.0, "elsewhere": 8.0 - 7.0 * 2 / 11, "share_seen": 1 / 12,
            "first": 8.0, "again": 1.0, "copied": 7.0,
        }
    )  # fmt: skip
    assert copying.seen_before(torch.tensor([[5, 1, 2, 1, 2]]), 2).tolist() == [[False] * 4 + [True]]
    assert copying.seen_before(torch.tensor([[2, 1, 2]]), 1).tolist() == [[False, False, True]]


def test_the_checkpoints_of_a_study_are_measured(tmp_path, megatron_cpu):
    """The weights that are measured are those of the checkpoint, not those that the model begins with."""
    from megatron.core import dist_checkpointing

    from benchmarks.quality import in_process

    flags = {
        "num-layers": 1, "hidden-size": 8, "num-attention-heads": 2, "seq-length": 8, "global-batch-size": 2,
        "train-iters": 4, "position-embedding-type": "rope", "disable-bias-linear": True,
        "moe-granular-experts": True, "moe-dispatch": "compact", "moe-router-dtype": "fp32",
        "attention-dropout": 0, "hidden-dropout": 0,
        "moe-router-type": "air", "num-experts": 64, "moe-router-topk": 4, "moe-ffn-hidden-size": 1,
    }  # fmt: skip
    run, device = study.Run("air", 64, 4, 1, 1, "stdlib", 50, flags), torch.device("cpu")
    text = torch.arange(2 * 9).remainder(4).view(2, 9)
    positions, mask = torch.arange(8).expand(2, 8), torch.ones(1, 1, 8, 8, dtype=torch.bool).triu(1)
    data = [{"tokens": text[:, :-1], "labels": text[:, 1:], "positions": positions, "mask": mask}]
    trainer = in_process.trainer_of(run, megatron_cpu, device, seed=1)
    for step in range(1, 3):
        trainer.step(data[0])
        folder = tmp_path / f"checkpoint/iter_{step:07d}"
        folder.mkdir(parents=True)
        dist_checkpointing.save({"model": trainer.model.module.sharded_state_dict()}, str(folder))
    checkpoints = copying.kept_checkpoints(tmp_path)
    assert list(checkpoints) == [1, 2]
    rows = pandas.DataFrame(copying.rows_of(run, checkpoints, data, megatron_cpu, device))
    expected = copying.measure_routing(trainer.model.module.eval(), trainer.routers, data)
    assert 0.25 < expected["best_1"] < 1.0  # of 4 experts
    assert dict(rows.iloc[1][list(expected)]) == pytest.approx(expected)
    assert rows.loss[0] != rows.loss[1]
    shown = copying.table(rows).splitlines()
    assert shown[0] == "| copied, at step | seed | 1 | 2 |"
    assert shown[2] == f"| air | 1 | {rows.copied[0]:.3f} | {rows.copied[1]:.3f} |"
    assert shown[6] == f"| air | 1 | {rows.elsewhere[0]:.3f} | {rows.elsewhere[1]:.3f} |"
    assert shown[-1] == f"| air | 1 | {rows.best_1[0]:.3f} | {rows.best_1[1]:.3f} |"
    copying.plot(rows, tmp_path / "copying.png")
    assert (tmp_path / "copying.png").stat().st_size > 10_000
