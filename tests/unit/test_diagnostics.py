"""The figures of the health line, worked by hand."""

import types

import pytest
import torch

from air_moe_megatron.diagnostics import dispatch_figures, listed_share, load_figures
from air_moe_megatron.dispatcher import Traffic


def test_load_figures_worked_example():
    figures = load_figures(torch.tensor([[2, 0, 1, 1]]), num_ranks=2)
    assert figures == {"experts-used": 0.75, "imbalance-factor": 1.5, "rank-imbalance": 1.0}


def test_load_figures_are_means_over_routers():
    figures = load_figures(torch.tensor([[1, 1, 1, 1], [8, 0, 0, 0]]), num_ranks=4)
    assert figures["experts-used"] == pytest.approx((1.0 + 0.25) / 2)
    assert figures["imbalance-factor"] == pytest.approx((1.0 + 4.0) / 2)
    assert figures["rank-imbalance"] == pytest.approx((1.0 + 4.0) / 2)


def test_no_tokens_at_all_are_no_error():
    assert load_figures(torch.zeros(1, 4, dtype=torch.int64), 1)["experts-used"] == 0.0


def test_listed_share_counts_each_expert_once_and_no_empty_place():
    def router(lists):
        return types.SimpleNamespace(num_experts=4, index=types.SimpleNamespace(shortlist=torch.tensor(lists)))

    assert listed_share([router([[0, 1], [1, -1]])]) == 0.5
    assert listed_share([router([[0, 1], [1, -1]]), router([[0, 1], [2, 3]])]) == 0.75


def test_dispatch_figures_are_per_token_and_start_anew():
    layer = torch.nn.Linear(1, 1)
    layer.token_dispatcher = types.SimpleNamespace(traffic=Traffic(10, 4000, 1000, 800, 200))
    other = torch.nn.Linear(1, 1)
    other.token_dispatcher = types.SimpleNamespace(traffic=Traffic(10, 2000, 1000, 800, 200))
    figures = dispatch_figures([layer, other], None)
    assert figures == {"dispatch-bytes-per-token": 300.0, "remote-bytes-per-token": 120.0}
    assert vars(layer.token_dispatcher.traffic) == vars(Traffic())
    assert dispatch_figures([], None) == {}
