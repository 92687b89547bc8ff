"""The plan's formulas against counters of small layers, and its words."""

import random
import re
from pathlib import Path

import pytest
import torch

from air_moe_megatron import plan
from tests.builders import make_config, make_layer

GIB = 2**30
SMALL = ["--experts", "256", "--hidden", "16", "--topk", "4", "--ep", "1", "--gpus-per-node", "1", "--dtype", "fp32"]
LARGE = ["--experts", "1048576", "--hidden", "4096", "--topk", "128", "--ep", "64", "--nodes", "32"]


def parsed(*flags):
    return plan.make_parser().parse_args(list(map(str, flags)))


def bytes_of(tensors):
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.fixture(scope="module")
def layer(megatron_cpu):
    return make_layer(megatron_cpu, moe_router_type="air", num_moe_experts=256)


@pytest.fixture(scope="module")
def predicted():
    return plan.predict(parsed(*SMALL, "--input-norm", "none"), is_sharded=False).memory


def test_weights_gradients_and_optimizer_state_are_those_of_a_layer(layer, predicted):
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    ddp = DistributedDataParallel(layer.config, DistributedDataParallelConfig(grad_reduce_in_fp32=True), layer)
    gradients = bytes_of(buffer.grad_data for buffer in (*ddp.buffers, *ddp.expert_parallel_buffers))
    optimizer = torch.optim.Adam(layer.parameters())
    for parameter in layer.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    state = bytes_of(value for one in optimizer.state.values() for value in one.values() if value.dim())
    for what, measured in (
        ("weights", bytes_of(layer.parameters())),
        ("gradients", gradients),
        ("optimizer state", state),
    ):
        expected = predicted[f"{what} of experts"] + predicted[f"{what} of routers"]
        assert expected == pytest.approx(measured, rel=0.05), what


@pytest.mark.parametrize("shortlist", (16, 128))  # pools of 4L experts, and of all
def test_codebook_and_lists_are_those_of_a_router(megatron_cpu, shortlist):
    router = make_layer(
        megatron_cpu, moe_router_type="air", num_moe_experts=256, moe_air_shortlist_size=shortlist
    ).router
    flags = (*SMALL, "--input-norm", "none", "--shortlist", shortlist)
    predicted = plan.predict(parsed(*flags), is_sharded=False).memory
    codebook = bytes_of([*router.codebook.buffers(), router.codebook.statistics])
    lists = bytes_of([*router.index.buffers(), router.expert_load, router.logged_before[:-1]])
    assert predicted["codebooks and input norms"] == codebook
    assert predicted["lists"] == lists


@pytest.mark.parametrize("name", ("running", "low_rank_whitening", "whitening"))
def test_bytes_of_the_input_norm_are_those_of_a_router(megatron_cpu, name):
    layer = make_layer(megatron_cpu, moe_router_type="air", num_moe_experts=256, moe_router_input_norm=name)
    norm = layer.router.input_norm
    without, with_norm = (
        plan.predict(parsed(*SMALL, "--input-norm", one), is_sharded=False).memory["codebooks and input norms"]
        for one in ("none", name)
    )
    assert with_norm - without == bytes_of([*norm.buffers(), norm.statistics])


def test_statistics_of_a_whitening_norm_are_sent_by_each_rank():
    sent = {
        norm: next(
            one.num_bytes
            for one in plan.predict(parsed(*LARGE, "--input-norm", norm), is_sharded=False).collectives
            if one.name.startswith("statistics")
        )
        for norm in ("none", "low_rank_whitening", "whitening")
    }
    ring = 2 * 255 / 256 * 4  # bytes per fp32 number
    assert sent["whitening"] - sent["none"] == ring * 4097**2
    assert sent["low_rank_whitening"] - sent["none"] == ring * (32 * 4096 + 3 * 4096 + 1)


@pytest.mark.parametrize(("experts", "topk", "ranks"), [(4, 2, 2), (16, 2, 2), (64, 8, 4), (64, 64, 4), (4096, 16, 16)])
def test_rows_of_a_token_are_those_of_random_choices(experts, topk, ranks):
    generator = random.Random(0)
    per_rank = experts // ranks
    drawn = [len({e // per_rank for e in generator.sample(range(experts), topk)}) for _ in range(4000)]
    assert plan.rows_per_token(experts, topk, ranks) == pytest.approx(sum(drawn) / len(drawn), rel=0.03)
    assert plan.rows_per_token(4, 2, 2) == pytest.approx(5 / 3)


def test_sharding_divides_what_belongs_to_an_expert_and_moves_rows_to_every_rank():
    replicated, sharded = (plan.predict(parsed(*LARGE), is_sharded) for is_sharded in (False, True))
    for name in ("weights of routers", "gradients of routers", "optimizer state of routers"):
        assert sharded.memory[name] == replicated.memory[name] / 64
    assert sharded.memory["codebooks and input norms"] == replicated.memory["codebooks and input norms"]
    assert replicated.memory["weights of routers"] == 8 * GIB
    assert replicated.first_rebuild_flops == 2 * 4096 * 2**20 * 4096  # 4096 codewords
    assert sharded.first_rebuild_flops == replicated.first_rebuild_flops / 64
    assert sharded.rebuild_flops == replicated.rebuild_flops == replicated.first_rebuild_flops / 256
    rows = [
        next(one for one in each.collectives if one.name.startswith("rows")).num_bytes for each in (replicated, sharded)
    ]
    assert rows[1] == 4 * 8192 * 63 * 4096 * 2 and rows[1] / rows[0] == pytest.approx(
        64 / plan.rows_per_token(2**20, 128, 64)
    )
    centers = {
        each.is_sharded: one for each in (replicated, sharded) for one in each.collectives if "centers" in one.name
    }
    assert (centers[False].group, centers[True].group) == (256, 4)


@pytest.mark.parametrize(("dtype", "weight"), [("bf16", 2), ("fp32", 4)])
def test_a_distributed_optimizer_scatters_gradients_and_gathers_weights(dtype, weight):
    def sent(*flags):
        found = plan.predict(parsed(*LARGE, "--dtype", dtype, *flags), is_sharded=False).collectives
        return [
            one.num_bytes for what in ("experts", "centers") for one in found if one.name.endswith(f"of the {what}")
        ]

    experts, centers = 2**20 // 64 * 2 * 4096, 2**20 * 4096
    assert sent() == pytest.approx([2 * 3 / 4 * 4 * experts, 2 * 255 / 256 * 4 * centers])
    each = 4 + weight
    assert sent("--distributed-optimizer") == pytest.approx([3 / 4 * each * experts, 255 / 256 * each * centers])


def test_time_is_that_of_the_slower_link():
    args = parsed(*LARGE, "--node-gbytes", 100, "--network-gbytes", 10)
    inside = plan.Collective("", 1e9, 8)
    outside = plan.Collective("", 1e9, 64)
    strided = plan.Collective("", 1e9, 4, stride=64)
    assert plan.seconds(args, inside) == pytest.approx(0.01)
    assert plan.seconds(args, outside) == pytest.approx(0.1 * 56 / 63)
    assert plan.seconds(args, strided) == pytest.approx(0.1)


@pytest.mark.parametrize("norm", ("running", "whitening"))
@pytest.mark.parametrize("explored", (0, 8))
@pytest.mark.parametrize("ep", (8, 64, 256))
@pytest.mark.parametrize("is_sharded", (False, True), ids=("replicated", "sharded"))
def test_router_flops_and_sizes_are_those_of_the_router_that_would_be_built(is_sharded, ep, explored, norm):
    from air_moe_megatron.config import resolve_sizes
    from air_moe_megatron.routers import AIRRouter
    from air_moe_megatron.routers.flops import Rebuilds

    args = parsed("--experts", 65536, "--hidden", 1024, "--topk", 16, "--ep", ep, "--nodes", 32, "--explored", explored)
    args.input_norm = norm
    config = make_config(
        moe_router_type="air", num_moe_experts=65536, hidden_size=1024, moe_router_topk=16,
        expert_model_parallel_size=ep, moe_air_shard_experts=is_sharded, moe_air_list_parts=ep if is_sharded else 1,
        moe_air_num_explored=explored, moe_router_input_norm=norm, moe_router_load_balancing_type="aux_loss",
        moe_aux_loss_coeff=0.01,
    )  # fmt: skip
    predicted = plan.predict(args, is_sharded)
    assert predicted.router_flops == AIRRouter.flops(config, Rebuilds(256 * 8192, on_gpu=True)).total
    sizes = resolve_sizes(config)
    assert resolve_sizes(plan.config_of(args, is_sharded)) == sizes
    assert f"lists of {sizes.shortlist_size}{f' in {ep} parts' if is_sharded else ''}, " in plan.report(args)[0]


def test_lists_that_cannot_be_sharded_leave_the_replicated_layout():
    flags = ("--experts", 65536, "--hidden", 1024, "--topk", 16, "--ep", 64, "--shortlist", 100)
    text, fits = plan.report(parsed(*flags, "--nodes", 8))
    assert fits and "replicated: fits into 80 GiB" in text
    assert "sharded: not possible: moe_air_list_parts (64) must divide moe_air_shortlist_size (100)" in text
    text, _ = plan.report(parsed(*flags, "--nodes", 8, "--memory-gib", 1.5))
    assert "what would fit:\n  --distributed-optimizer, replicated: " in text


def test_a_model_may_have_more_parts_than_ranks():
    args = parsed(*LARGE, "--list-parts", 256)
    for is_sharded in (False, True):
        assert plan.config_of(args, is_sharded).moe_air_list_parts == 256
    assert "in 256 parts" in plan.report(args)[0] and "AIR, sharded" not in plan.report(args)[0]


def test_the_document_shows_what_the_command_prints():
    document = (Path(__file__).parents[2] / "docs/tools.md").read_text()
    flags = re.search(r"-m air_moe_megatron\.plan (.*)", document)[1].split()
    assert f"```text\n{plan.report(parsed(*flags))[0]}```" in document


def test_memory_of_a_small_model_is_in_mebibytes():
    args = parsed("--experts", 64, "--hidden", 64, "--topk", 4, "--ep", 1, "--gpus-per-node", 1, "--tokens", 128)
    text, _ = plan.report(args)
    assert "on 1 rank, EP 1\n" in text and "MiB per rank" in text
    (weights,) = re.findall(r"weights of routers +([\d.]+)", text)
    assert float(weights) == pytest.approx(plan.predict(args, False).memory["weights of routers"] / 2**20, abs=1e-3)
    assert float(weights) > 0


def test_what_does_not_fit_is_said_with_what_would(capsys):
    with pytest.raises(SystemExit, match="0"):
        plan.main(LARGE)
    said = capsys.readouterr().out
    assert "replicated: does not fit into 80 GiB" in said and "sharded: fits into 80 GiB" in said
    assert "--distributed-optimizer, replicated: " in said
    with pytest.raises(SystemExit, match="1"):
        plan.main([*LARGE, "--memory-gib", "1"])
    assert "nothing of --ep, --distributed-optimizer and sharding fits" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (
            "--experts 98304 --hidden 64 --tokens 128 --memory-gib 0.05",
            [
                "--ep 24, sharded",
                "--ep 12, --distributed-optimizer, sharded",
                "--ep 24, --distributed-optimizer, sharded",
            ],
        ),
        (
            "--experts 12288 --hidden 1024 --memory-gib 0.4",
            [
                "--ep 4, sharded",
                "--ep 3, sharded",
                "--ep 6, --distributed-optimizer, sharded",
                "--ep 4, --distributed-optimizer, replicated",
            ],
        ),
    ],
    ids=("larger", "smaller"),
)
def test_all_expert_parallel_sizes_are_tried_fewest_changes_and_nearest_sizes_first(flags, expected):
    text, fits = plan.report(parsed(*flags.split(), "--topk", 16, "--ep", 8, "--nodes", 3))
    lines = text.partition("what would fit:\n")[2].splitlines()
    assert not fits and [line.strip().partition(":")[0] for line in lines] == expected


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--topk", "300"], r"--topk \(300\) must not exceed --experts \(256\)"),
        (["--ep", "3"], r"--experts \(256\) must be divisible by --ep \(3\)"),
        (["--ep", "2"], r"--nodes times --gpus-per-node \(1\) must be divisible by --ep \(2\)"),
        (["--tokens", "0"], r"--tokens \(0\) must be at least 1"),
        (["--refresh-interval", "0"], r"refresh_interval \(0\) must be at least 1"),
        (["--clusters", "-1"], r"num_clusters \(-1\) must be positive"),
        (["--clusters", "300"], r"num_clusters \(300\) must not exceed"),
        (["--shortlist", "-8"], r"shortlist_size \(-8\) must be positive"),
        (["--shortlist", "4"], r"shortlist_size \(4\) must exceed moe_router_topk \(4\)"),
        (["--probes", "100"], r"num_probes \(100\) must not exceed"),
        (["--candidates", "2"], r"num_candidates \(2\) must be between"),
        (["--explored", "-1"], r"num_explored \(-1\) must be at least 0"),
        (["--list-parts", "3"], r"list_parts \(3\) must divide"),
        (["--network-gbytes", "0"], r"--network-gbytes \(0.0\) must be positive"),
        (["--node-gbytes", "-1"], r"--node-gbytes \(-1.0\) must be positive"),
        (["--memory-gib", "nan"], r"--memory-gib \(nan\) must be positive"),
    ],
)
def test_values_that_cannot_be_are_refused_by_name(flags, words, capsys):
    with pytest.raises(SystemExit, match="2"):
        plan.main([*SMALL, *flags])
    assert re.search(words, capsys.readouterr().err)


@pytest.mark.parametrize("is_sharded", (False, True), ids=("replicated", "sharded"))
def test_a_recomputed_forward_sends_again(is_sharded):
    once, twice = (
        {one.name.split()[0]: one for one in plan.predict(parsed(*LARGE, *flags), is_sharded).collectives}
        for flags in ((), ("--recompute",))
    )
    assert twice["rows"].num_bytes == 1.5 * once["rows"].num_bytes
    for name in ("pairs", *(["scores"] if is_sharded else [])):
        assert twice[name].num_bytes == pytest.approx(once[name].num_bytes + once[name].outward)
    assert {name: one.outward for name, one in twice.items()} == {name: one.outward for name, one in once.items()}
    for name in ("gradients", "statistics"):
        assert twice[name] == once[name]


def test_a_single_expert_per_token_is_planned(capsys):
    with pytest.raises(SystemExit, match="0"):
        plan.main("--experts 4096 --hidden 64 --topk 1 --ep 2 --gpus-per-node 2".split())
    assert "4096 experts, K = 1" in capsys.readouterr().out


@pytest.mark.parametrize("explored", (0, 100))
def test_what_a_sharded_layout_sends_is_what_its_document_says(explored):
    """The formulas of docs/sharded-routing.md, without the share of the bytes that stays on the rank."""
    args = parsed(*LARGE, "--explored", str(explored))
    sent = {one.name.split()[0]: one.num_bytes for one in plan.predict(args, is_sharded=True).collectives}
    ranks, tokens, topk, probes, candidates = args.ep, args.tokens, args.topk, 8, 1024
    kept = min(8 * 576 // ranks, candidates) + -(-explored // ranks)
    assert sent["scores"] == pytest.approx(
        (ranks - 1) * tokens * (4 * probes + 9 * kept)
        + (ranks - 1) / ranks * 4 * tokens * (candidates + -(-explored // ranks) * ranks)
    )
    assert sent["pairs"] == pytest.approx((ranks - 1) / ranks * 8 * tokens * topk)
    assert sent["rows"] == pytest.approx(4 * (ranks - 1) * tokens * args.hidden * 2)
