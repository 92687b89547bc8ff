"""Learners of several layers that learn as a batch: the same as each alone."""

import copy

import pytest
import torch

from air_moe_megatron.learned import learner as learner_module
from air_moe_megatron.learned.codebook import Codebook
from air_moe_megatron.learned.learner import apply_updates, batches_of
from air_moe_megatron.learned.low_rank_whitening_norm import LowRankWhiteningNorm
from air_moe_megatron.learned.running_norm import RunningNorm
from air_moe_megatron.learned.whitening_norm import WhiteningNorm
from air_moe_megatron.ops.coarse import assign_with_statistics
from air_moe_megatron.sync import update_codebooks
from tests.builders import make_router
from tests.codebooks import randn

HIDDEN, LAYERS = 8, 5
MAKE = {
    "codebook": lambda: Codebook(6, HIDDEN, 0.9),
    "running norm": lambda: RunningNorm(HIDDEN),
    "whitening norm": lambda: WhiteningNorm(HIDDEN),
    "low-rank whitening norm": lambda: LowRankWhiteningNorm(HIDDEN),
}


def feed(learner, tokens):
    if isinstance(learner, Codebook):
        learner.accumulate(assign_with_statistics(tokens, learner.codewords, 1)[1])
    else:
        learner.accumulate(tokens, None)


def tokens_of(layer, step):
    """Layer 1 has one cluster of tokens, so that most of its codewords starve."""
    tokens = randn(40, HIDDEN, seed=100 * layer + step)
    return tokens * 0.01 + 1.0 if layer == 1 else tokens


@pytest.mark.parametrize("layers_at_once", (1, 2, LAYERS))
@pytest.mark.parametrize("kind", MAKE)
def test_a_batch_learns_as_each_alone(kind, layers_at_once, monkeypatch):
    together = [MAKE[kind]() for _ in range(LAYERS)]
    alone = copy.deepcopy(together)
    numbers = layers_at_once * together[0].statistics.numel()
    monkeypatch.setattr(learner_module, "_NUMBERS_OF_BATCH", numbers)
    for step in range(4):
        # In step 2 layer 3 has no token, and a token of layer 4 is not finite: from then on ages may differ.
        states = [(step != 2 or layer != 4, step != 2 or layer != 3) for layer in range(LAYERS)]
        for learners in (together, alone):
            for layer, learner in enumerate(learners):
                feed(learner, tokens_of(layer, step))
        for batch in batches_of(together):
            of_batch = [states[together.index(learner)] for learner in batch]
            apply_updates(batch, [learner.statistics for learner in batch], of_batch)
        for learner, state in zip(alone, states, strict=True):
            learner.apply_update(learner.statistics, *state)
        for learner in (*together, *alone):
            learner.discard()
    assert [learner.updates_on_host for learner in together] == [learner.updates_on_host for learner in alone]
    for one, other in zip(together, alone, strict=True):
        for (name, value), expected in zip(one.named_buffers(), other.buffers(), strict=True):
            torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-7, msg=f"{name} of {kind}")


def test_layers_of_other_shapes_and_ages_learn_apart(megatron_cpu):
    """One call for four routers: two alike, one with more codewords, one an update behind."""
    sizes = (8, 8, 16, 8)
    made = (make_router(megatron_cpu, moe_router_type="air", moe_air_num_clusters=number) for number in sizes)
    routers = torch.nn.ModuleList(made).train()
    for step in range(2):
        for router in routers if step else routers[:3]:
            router.route(randn(64, router.config.hidden_size, seed=step))
        update_codebooks(routers if step else routers[:3])
    assert [router.codebook.updates_on_host for router in routers] == [2, 2, 2, 1]
    assert torch.equal(routers[0].codebook.codewords, routers[1].codebook.codewords)
    assert all(router.codebook.statistics.eq(0).all() for router in routers)
    assert all(router.codebook.health().live_codewords > 0 for router in routers)
