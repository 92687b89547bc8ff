"""The plan's dispatched bytes against the counters of four processes."""

import types
from pathlib import Path

import pytest
import torch

from air_moe_megatron.plan import make_parser, predict
from tests.builders import make_config
from tests.processes import gloo_rank, run_ranks

EXPERTS, TOPK, HIDDEN, TOKENS = 64, 4, 16, 1000


def dispatch(rank: int, num_ranks: int, directory: str) -> None:
    from air_moe_megatron import cpu

    cpu.enable()
    from air_moe_megatron.layer.dispatcher import CompactTokenDispatcher

    with gloo_rank(rank, num_ranks, directory) as group:
        groups = types.SimpleNamespace(ep=group, expt_tp=None, tp_ep=group)
        config = make_config(num_moe_experts=EXPERTS, moe_router_topk=TOPK, hidden_size=HIDDEN, moe_router_type="air")
        dispatcher = CompactTokenDispatcher(EXPERTS // num_ranks, config, groups)
        generator = torch.Generator().manual_seed(rank)
        ids = torch.rand(TOKENS, EXPERTS, generator=generator).topk(TOPK, dim=1).indices.int()
        hidden, probs = torch.randn(TOKENS, HIDDEN), torch.full((TOKENS, TOPK), 0.25)
        dispatcher.token_dispatch(*dispatcher.dispatch_preprocess(hidden, ids, probs))
        torch.save(vars(dispatcher.traffic), Path(directory) / f"{rank}.pt")


def test_dispatched_bytes_are_those_of_four_ranks(tmp_path):
    traffic = run_ranks(dispatch, 4, tmp_path)
    flags = (
        f"--experts {EXPERTS} --topk {TOPK} --hidden {HIDDEN} --ep 4 --gpus-per-node 4 --tokens {TOKENS} --dtype fp32"
    )
    rows, pairs = predict(make_parser().parse_args(flags.split()), is_sharded=False).collectives[:2]
    assert sum(one["remote_row_bytes"] for one in traffic) == pytest.approx(rows.num_bytes, rel=0.05)  # 4 ranks, 4 ways
    out = sum(one["remote_pair_bytes"] for one in traffic) / 4
    assert out * 12 / 8 == pytest.approx(pairs.num_bytes, rel=0.05)  # an id and a prob go out, a gradient comes back
    sent = sum(one["remote_row_bytes"] + one["remote_pair_bytes"] for one in traffic) / 4
    assert sent == pytest.approx(rows.outward + pairs.outward, rel=0.05)
