"""What rank 0 makes of all reports reaches every rank; ranks with other flags are named."""

import argparse
import importlib.metadata
import threading

import pytest
import torch

from air_moe_megatron.command import agreement
from air_moe_megatron.command.agreement import Ranks, check_agreement
from tests.processes import HANG_SECONDS


def on_ranks(world_size, call):
    """What `call(ranks)` returns or raises on each rank; ranks are threads that share a store."""
    store, outcomes = torch.distributed.HashStore(), [None] * world_size

    def run(rank):
        try:
            outcomes[rank] = call(Ranks(rank, world_size, store))
        except Exception as error:
            outcomes[rank] = error

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=HANG_SECONDS)
        assert not thread.is_alive(), "a rank waits for the others"
    return outcomes


@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_every_rank_gets_what_rank_0_makes_of_the_reports(world_size):
    def call(ranks):
        first = ranks.agree("ranks", ranks.rank, lambda reports: reports)
        return first, ranks.agree("sum", 2 * ranks.rank, sum)

    everyone = list(range(world_size))
    assert on_ranks(world_size, call) == [(everyone, 2 * sum(everyone))] * world_size


def test_what_the_judge_raises_ends_every_rank():
    def refuse(reports):
        raise ValueError("not this way")

    outcomes = on_ranks(3, lambda ranks: ranks.agree("topic", None, refuse))
    assert [type(outcome) for outcome in outcomes] == [ValueError] * 3
    assert {str(outcome) for outcome in outcomes} == {"not this way"}

    outcomes = on_ranks(3, lambda ranks: ranks.agree("topic", None, lambda reports: reports[7]))
    assert isinstance(outcomes[0], IndexError)
    assert {str(outcome) for outcome in outcomes[1:]} == {"rank 0 failed: IndexError('list index out of range')"}


def test_what_one_rank_finds_ends_every_rank():
    """Data may be missing on one node; the others must not wait for its rank."""

    def check(rank):
        if rank == 2:
            raise ValueError("--data-path 'x': 'x.idx' does not exist")

    outcomes = on_ranks(4, lambda ranks: ranks.check("data", lambda: check(ranks.rank)))
    assert [type(outcome) for outcome in outcomes] == [ValueError] * 4
    assert {str(outcome) for outcome in outcomes} == {"rank 2: --data-path 'x': 'x.idx' does not exist"}
    assert on_ranks(2, lambda ranks: ranks.check("data", lambda: check(ranks.rank))) == [None, None]


def given(rank, **changes):
    """Arguments of one rank, with what differs between all ranks."""
    own = {"rank": rank, "load": f"/node{rank}", "data_cache_path": f"/node{rank}", "handle": object()}
    return argparse.Namespace(**own | {"lr": 0.1, "num_experts": 8} | changes)


def test_the_same_flags_pass_whatever_the_paths():
    assert on_ranks(3, lambda ranks: check_agreement(given(ranks.rank), ranks)) == [None] * 3


def test_other_flags_are_named_with_their_values_and_ranks():
    changes = {1: {"lr": 0.2}, 2: {"lr": 0.3, "extra": "x"}, **{rank: {"num_experts": 9} for rank in range(3, 13)}}
    outcomes = on_ranks(13, lambda ranks: check_agreement(given(ranks.rank, **changes.get(ranks.rank, {})), ranks))
    assert {str(outcome) for outcome in outcomes} == {
        "all ranks must be started with the same flags and versions: extra is unset on rank 0, 'x' on rank 2; "
        "lr is 0.1 on rank 0, 0.2 on rank 1, 0.3 on rank 2; "
        "num_experts is 8 on rank 0, 9 on rank 3, 4, 5, 6, 7, 8, 9, 10 and 2 more"
    }


def test_other_versions_are_named(monkeypatch):
    """Ranks are threads here, so which of the two has which version is a matter of luck."""
    versions = iter(["2.11.0", "2.12.0"])
    monkeypatch.setattr(agreement, "software", lambda: {"version of torch": next(versions)})
    outcomes = on_ranks(2, lambda ranks: check_agreement(given(ranks.rank), ranks))
    first, second = sorted(["2.11.0", "2.12.0"], key=lambda version: f"{version} on rank 1" in str(outcomes[0]))
    expected = f"the same flags and versions: version of torch is {first} on rank 0, {second} on rank 1"
    assert [str(outcome).endswith(expected) for outcome in outcomes] == [True, True]


def test_a_change_in_our_sources_changes_their_hash(monkeypatch, tmp_path):
    package = tmp_path / "package"
    (package / "command").mkdir(parents=True)
    (package / "layer.py").write_text("a = 1\n")
    monkeypatch.setattr(agreement, "__file__", str(package / "command/agreement.py"))
    before = agreement.software()
    assert before == agreement.software() and before["version of torch"] == importlib.metadata.version("torch")
    (package / "layer.py").write_text("a = 2\n")
    assert {name for name, value in agreement.software().items() if value != before[name]} == {"hash of our sources"}
