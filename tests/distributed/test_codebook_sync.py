"""The all-reduce of codebooks and input norms over gloo ranks with unequal numbers of tokens, bitwise equal on all."""

import contextlib
import logging

import pytest
import torch

from tests.codebooks import assert_same_bits
from tests.processes import gloo_rank, ranks_fixture

HIDDEN, CLUSTERS, UPDATES = 16, 12, 6
POISONED = (1, 3)  # rank and update with a NaN among the tokens of the first layer
# Sums in another order, and the rounding that they carry through the updates.
CLOSE = dict(rtol=1e-5, atol=1e-5)


def make_layers(num_layers, source="tokens", group=None):
    """AIR routers without Megatron's constructor, which needs its process groups: only what the update reads."""
    from air_moe_megatron.learned.codebook import Codebook
    from air_moe_megatron.learned.index import ShortlistIndex
    from air_moe_megatron.learned.low_rank_whitening_norm import LowRankWhiteningNorm
    from air_moe_megatron.learned.recomputation import ForwardCounter
    from air_moe_megatron.learned.running_norm import RunningNorm
    from air_moe_megatron.learned.whitening_norm import WhiteningNorm
    from air_moe_megatron.routers.air import AIRRouter

    layers = torch.nn.ModuleList()
    for number in range(num_layers):
        layer = AIRRouter.__new__(AIRRouter)
        torch.nn.Module.__init__(layer)
        layer.layer_number, layer.is_mtp_layer, layer.tp_dp_cp_group = number + 1, False, group
        layer._forwards, layer.has_learned, layer.global_tokens_per_expert = ForwardCounter(), True, None
        for name, size in (("expert_load", 1), ("num_routed", 1), ("logged_before", 2)):
            layer.add_accumulator(name, torch.zeros(size, dtype=torch.int64))
        layer.codebook = Codebook(CLUSTERS, HIDDEN, 0.8)
        layer.index = ShortlistIndex(48, CLUSTERS, 4, source=source, refresh_interval=1)
        norm = (RunningNorm, WhiteningNorm, LowRankWhiteningNorm)[number % 3]
        layer.input_norm = norm(HIDDEN) if source == "tokens" else None
        layers.append(layer)
    return layers


def tokens_of(rank, update, layer):
    """Unequal numbers of tokens per rank and update, none on some; few directions, so that codewords starve."""
    generator = torch.Generator().manual_seed(1000 * update + 10 * rank + layer)
    num_tokens = (37 * (rank + 1) + 13 * update) % 90 if (rank + update) % 4 != 3 else 0
    centers = torch.randn(3 + update, HIDDEN, generator=torch.Generator().manual_seed(layer))
    which = torch.randint(len(centers), (num_tokens,), generator=generator)
    return centers[which] + 0.3 * torch.randn(num_tokens, HIDDEN, generator=generator)


def accumulate(layer, hidden):
    from air_moe_megatron.ops.coarse import assign_with_statistics

    layer.input_norm.accumulate(hidden, None)
    layer.codebook.accumulate(assign_with_statistics(hidden, layer.codebook.codewords, 1)[1])


def codebooks(layers):
    learned = ("codebook", "input_norm")
    return {name: value.clone() for name, value in layers.state_dict().items() if name.split(".")[1] in learned}


@contextlib.contextmanager
def counted_all_reduces():
    """Counts the collectives of torch.distributed while it is entered."""
    counts = []
    original = torch.distributed.all_reduce

    def all_reduce(*args, **kwargs):
        counts.append(args[0].numel())
        return original(*args, **kwargs)

    torch.distributed.all_reduce = all_reduce
    try:
        yield counts
    finally:
        torch.distributed.all_reduce = original


def learn(rank, group, num_layers, poisoned=None):
    """Several updates; returns the codebooks after each, the numbers dropped, and the number of all-reduces."""
    from air_moe_megatron.sync import update_codebooks

    layers = make_layers(num_layers, group=group)
    history, dropped, reduces = [], [], []
    for update in range(UPDATES):
        for number, layer in enumerate(layers):
            hidden = tokens_of(rank, update, number)
            if poisoned == (rank, update) and number == 0:
                hidden[len(hidden) // 2, 1] = float("nan")
            for microbatch in hidden.split(20) if len(hidden) else (hidden,):
                accumulate(layer, microbatch)
        with counted_all_reduces() as counts:
            dropped.append(update_codebooks(layers, group))
        reduces.append(len(counts))
        history.append(codebooks(layers))
        assert all(layer.codebook.statistics.count_nonzero() == 0 for layer in layers)
    return history, dropped, reduces


def learn_experts(rank, group, num_layers, source="experts", without_forward=None):
    """Routers whose codebook follows the centers: the update is counted."""
    from air_moe_megatron.sync import update_codebooks

    layers = make_layers(num_layers, source, group)
    if rank == without_forward:
        layers[1].has_learned = False
    with counted_all_reduces() as counts:
        dropped = update_codebooks(layers, group)
    return [codebooks(layers)], [dropped], [len(counts)]


def refusal(learn, *args):
    """The message of the error that learning ends in."""
    with pytest.raises(ValueError) as error:
        learn(*args)
    return str(error.value)


def update_alone(group, source, without_norm):
    """An update on each rank by itself, of routers whose tokens are on all ranks of the group."""
    from air_moe_megatron.sync import update_codebooks

    layers = make_layers(2, source, group)
    if without_norm:
        layers[0].input_norm = None
    update_codebooks(layers)


def worker(rank, world_size, directory):
    """All scenarios on one rank, saved for the tests; starting the processes takes longer than running them."""
    with gloo_rank(rank, world_size, directory) as group:
        logging.disable(logging.WARNING)
        results = {
            "plain": learn(rank, group, 3),
            "poisoned": learn(rank, group, 2, POISONED),
            "five-routers": learn(rank, group, 5),
            "lists-of-experts": learn_experts(rank, group, 3),
            **{
                ("rank-without-forward", source): refusal(learn_experts, rank, group, 3, source, 1)
                for source in ("tokens", "experts")
            },
            "alone": [
                refusal(update_alone, group, *case) for case in (("tokens", False), ("tokens", True), ("experts", True))
            ],
        }
        torch.save(results, f"{directory}/{rank}.pt")


ranks = ranks_fixture(worker, 2, 4)


def learn_alone(world_size, num_layers):
    """One rank with the tokens of all."""
    from air_moe_megatron.sync import update_codebooks

    layers, history, splits = make_layers(num_layers), [], 0
    for update in range(UPDATES):
        for number, layer in enumerate(layers):
            hidden = torch.cat([tokens_of(rank, update, number) for rank in range(world_size)])
            accumulate(layer, hidden)
            counts = 0.8 * layer.codebook.ema[:, HIDDEN] + 0.2 * layer.codebook.statistics[:, HIDDEN]
            splits += int((counts < 0.1 * counts.mean()).sum())
        assert update_codebooks(layers) == 0
        history.append(codebooks(layers))
    return history, splits


def test_ranks_learn_bitwise_the_same_and_what_one_rank_learns_from_all_tokens(ranks):
    expected, splits = learn_alone(len(ranks), 3)
    assert splits > 0
    for history, dropped, _ in (results["plain"] for results in ranks):
        assert dropped == [0] * UPDATES
        for update in range(UPDATES):
            assert_same_bits(history[update], ranks[0]["plain"][0][update])
            for name, value in expected[update].items():
                torch.testing.assert_close(history[update][name], value, **CLOSE)
    for update in range(1, UPDATES):
        assert not torch.equal(expected[update]["0.codebook.codewords"], expected[update - 1]["0.codebook.codewords"])


def test_a_nan_on_one_rank_drops_the_update_of_that_layer_on_all(ranks):
    _, poisoned_update = POISONED
    for history, dropped, _ in (results["poisoned"] for results in ranks):
        assert dropped == [int(update == poisoned_update) for update in range(UPDATES)]
        before, after = history[poisoned_update - 1], history[poisoned_update]
        assert torch.equal(after["0.codebook.codewords"], before["0.codebook.codewords"])
        assert torch.equal(after["0.codebook.ema"], before["0.codebook.ema"])
        assert torch.equal(after["0.input_norm.mean"], before["0.input_norm.mean"])
        assert not torch.equal(after["1.input_norm.mean"], before["1.input_norm.mean"])
        assert after["0.codebook.num_dropped"] == 1 and after["1.codebook.num_dropped"] == 0
        assert not torch.equal(after["1.codebook.codewords"], before["1.codebook.codewords"])
        assert history[-1]["0.codebook.codewords"].isfinite().all()
        assert not torch.equal(history[-1]["0.codebook.codewords"], after["0.codebook.codewords"])
        for update in range(UPDATES):
            assert_same_bits(history[update], ranks[0]["poisoned"][0][update])


@pytest.mark.parametrize("scenario", ("plain", "five-routers"))
def test_one_all_reduce_however_many_routers(ranks, scenario):
    for _, _, reduces in (results[scenario] for results in ranks):
        assert reduces == [1] * UPDATES


def test_a_rank_without_a_forward_is_refused(ranks):
    """Its lists would come from later centers, with source 'experts' its codewords too."""
    for results in ranks:
        for source in ("tokens", "experts"):
            assert results["rank-without-forward", source] == (
                "layer 2: every rank must run an AIR router in every step, and "
                f"1 of {len(ranks)} ranks had no training forward of it; give a rank that has no tokens an empty batch"
            )


def test_an_update_that_leaves_ranks_with_tokens_out_is_refused(ranks):
    """Norms, codebooks and lists of the ranks would drift apart, most of them unnoticed."""
    for results in ranks:
        (message,) = set(results["alone"])
        assert message == (
            f"layer 1: group (1 ranks) must hold all {len(ranks)} ranks with different tokens; give it the process "
            "group tp_dp_cp"
        )


def test_lists_of_experts_need_one_all_reduce_of_a_number_each(ranks):
    for history, dropped, reduces in (results["lists-of-experts"] for results in ranks):
        assert dropped == [0] and reduces == [1]
        assert all(value == 1 for name, value in history[0].items() if name.endswith("num_updates"))
