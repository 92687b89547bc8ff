"""Every front door: what the kernels do not take is torch's, and is not forced in silence."""

import pytest
import torch

from air_moe_megatron.ops.coarse import assign, assign_with_statistics, token_statistics
from air_moe_megatron.ops.exchange import make_plan
from air_moe_megatron.ops.fine_scores import fine_scores, fine_topk
from air_moe_megatron.ops.granular_experts import granular_experts
from air_moe_megatron.ops.norm import batch_sums, normalize
from air_moe_megatron.ops.pair_products import make_pairs, pair_dots, pair_sums
from air_moe_megatron.ops.ranking import rank_experts
from air_moe_megatron.ops.selected_scores import selected_scores

WIDE = dict(dtype=torch.float64)
PLACE = torch.zeros(3, dtype=torch.int64)
PAIRS = make_pairs(torch.arange(3), PLACE, 3, 5)
LISTS = torch.arange(4).view(2, 2), PLACE.view(3, 1)

# One call in fp64 for each; exchange copies any dtype, and plans for more ranks than its kernels take.
CALLS = {
    "norm-normalize": lambda: normalize(torch.ones(3, 4, **WIDE), torch.ones(4), torch.ones(4)),
    "norm-sums": lambda: batch_sums(torch.ones(3, 4, **WIDE), torch.ones(4), None),
    "coarse-assign": lambda: assign(torch.ones(3, 4, **WIDE), torch.eye(4), 1),
    "coarse-statistics": lambda: token_statistics(torch.ones(3, 4, **WIDE), torch.eye(4), PLACE),
    "coarse-both": lambda: assign_with_statistics(torch.ones(3, 4, **WIDE), torch.eye(4), 1)[1],
    "coarse-probes": lambda: assign(torch.ones(3, 12), torch.eye(12), 9),
    "ranking": lambda: rank_experts(torch.eye(4), torch.ones(4), torch.ones(5, 4, **WIDE), None, 2).lists,
    "fine_scores": lambda: fine_scores(torch.ones(3, 4, **WIDE), torch.ones(5, 4, **WIDE), None, *LISTS, torch.float64),
    "fine_scores-arithmetic": lambda: fine_scores(torch.ones(3, 4), torch.ones(5, 4), None, *LISTS, torch.float64),
    "fine_scores-topk": lambda: fine_topk(
        torch.ones(3, 4, **WIDE), torch.ones(5, 4, **WIDE), None, *LISTS, 1, torch.float64
    )[0],
    "selected_scores": lambda: selected_scores(
        torch.ones(3, 4, **WIDE), torch.ones(5, 4, **WIDE), None, PLACE.view(3, 1), torch.ones(3, 1, **WIDE)
    ),
    "pair_products-dots": lambda: pair_dots(torch.ones(3, 4, **WIDE), torch.ones(5, 4, **WIDE), PAIRS),
    "pair_products-sums": lambda: pair_sums(torch.ones(3, **WIDE), torch.ones(5, 4, **WIDE), PAIRS),
    "granular_experts": lambda: granular_experts(
        torch.ones(3, 4, **WIDE), *[torch.ones(5, 2, 4, **WIDE)] * 2, torch.ones(3, **WIDE), PAIRS, torch.relu, "relu"
    ),
    "exchange-ranks": lambda: make_plan(PLACE.view(3, 1), torch.ones(3, 1), 1025, 1).counts,
}


@pytest.mark.parametrize("name", CALLS)
def test_what_kernels_do_not_take_is_done_by_torch_and_not_forced_in_silence(name, monkeypatch):
    assert CALLS[name]().numel()
    monkeypatch.setenv("AIR_MOE_BACKEND", "triton")
    with pytest.raises(ValueError, match=f"cannot be used for {name.split('-')[0]}: .*(torch.float64|exceeds)"):
        CALLS[name]()
