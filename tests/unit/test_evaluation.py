"""Routing while a model is evaluated: each window of the data counts once, and layers have the numbers of the files."""

import argparse

import numpy
import pytest
import torch

from air_moe_megatron.diagnostics.metrics import describe
from air_moe_megatron.inference import evaluation
from air_moe_megatron.inference.data import TokenStream
from air_moe_megatron.tune.capture import collectors_of
from tests.builders import HIDDEN, make_router

LENGTH, VOCABULARY = 8, 31


class Model(torch.nn.Module):
    """A router behind an embedding; its loss is one nat per token that counts."""

    def __init__(self, router):
        super().__init__()
        self.embedding = torch.nn.Embedding(VOCABULARY, router.config.hidden_size)
        self.router = router

    def forward(self, batch):
        self.router(self.embedding(batch["tokens"]).transpose(0, 1))
        return batch["loss_mask"].sum() * torch.ones(2)


@pytest.fixture
def figures_of(megatron_cpu, monkeypatch):
    def run_forwards(model, batches, args):
        return [{"lm loss": model[0](next(batches))}]

    monkeypatch.setattr(evaluation, "run_forwards", run_forwards)
    tokens = numpy.random.default_rng(0).integers(0, VOCABULARY, 3 * LENGTH + 1)

    def figures_of(fields, micro_batch_size):
        torch.manual_seed(0)
        model = Model(make_router(megatron_cpu, num_moe_experts=64, moe_router_topk=4, **fields).eval())
        args = argparse.Namespace(
            seq_length=LENGTH, micro_batch_size=micro_batch_size, decoder_seq_length=None, reset_position_ids=False,
            reset_attention_mask=False, create_attention_mask_in_dataloader=False,
        )  # fmt: skip
        return evaluation.evaluate([model], TokenStream("x", tokens, None), 0, args)

    return figures_of


@pytest.mark.parametrize(
    "fields",
    [
        dict(moe_router_type="air", moe_granular_experts=True, moe_dispatch="compact"),
        dict(moe_router_type="air"),
        dict(moe_router_type="topk"),
    ],
    ids=["air", "air-dense", "topk"],
)
def test_windows_that_fill_a_microbatch_do_not_count_in_the_routing(figures_of, fields):
    expected = figures_of(fields, 1)
    assert expected.tokens == 3 * LENGTH and expected.loss == 1
    for micro_batch_size in (2, 3, 4, 8):
        found = figures_of(fields, micro_batch_size)
        assert (found.tokens, found.loss) == (expected.tokens, 1)
        assert found.layers[0] == {
            name: pytest.approx(value) if isinstance(value, float) else value
            for name, value in expected.layers[0].items()
        }


@pytest.mark.parametrize("router_type", ["product_key", "vq"])
def test_experts_that_fill_up_a_dense_map_are_no_load(megatron_cpu, router_type):
    """Routers that may choose an expert twice get further experts with a prob of zero for Megatron's dispatchers."""
    router = make_router(megatron_cpu, moe_router_type=router_type, moe_router_topk=8, moe_dispatch="stock").eval()
    hidden = torch.randn(50, 4, HIDDEN)
    meter = evaluation.RoutingMeter(router)
    router(hidden)
    meter.remove()
    ids, probs = router.route(hidden).topk_ids, router.route(hidden).probs
    chosen = torch.zeros(200, router.num_experts).scatter_add_(1, ids.long(), probs.detach()) > 0
    assert torch.equal(meter.loads, chosen.sum(dim=0)) and meter.loads.sum() < 200 * 8


def test_every_command_and_file_has_the_same_number_of_a_layer(megatron_cpu):
    """Layers 1 and 3 are dense; the last router is that of a multi-token-prediction layer."""
    routers = [make_router(megatron_cpu, moe_router_type="air", num_layers=4).eval() for _ in range(3)]
    for router, number in zip(routers, (2, 4, 1), strict=True):
        router.set_layer_number(number)
    routers[2].is_mtp_layer = True
    model = torch.nn.ModuleList(routers)
    meters = evaluation.meters_of([model])
    for router in routers:
        router(torch.randn(5, 1, HIDDEN))
    assert [meter.metrics()["layer"] for meter in meters] == [2, 4, 5]
    assert list(collectors_of([model])) == ["2", "4", "5"]
    assert [describe(router, 5)["layer"] for router in routers] == [2, 4, 5]


def test_recall_of_a_microbatch_weighs_as_its_tokens(megatron_cpu, monkeypatch):
    """256 tokens, of which a quarter is measured, and 16 tokens, of which all are."""
    router = make_router(megatron_cpu, moe_router_type="air", num_moe_experts=64).eval()
    found = iter([(0.5, 0.5), (1.0, 1.0)])
    monkeypatch.setattr(evaluation, "recall", lambda router, sample: next(found))
    meter = evaluation.RoutingMeter(router)
    for shape in ((64, 4, HIDDEN), (16, 1, HIDDEN)):
        router(torch.randn(shape))
    assert meter.metrics()["topk_recall"] == pytest.approx((256 * 0.5 + 16 * 1.0) / 272)
