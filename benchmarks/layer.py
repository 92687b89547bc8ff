"""The whole layer: router, dispatch and experts of AIR-MoE against a PEER layer of the same experts."""

import argparse
import logging
import multiprocessing
from functools import partial

import torch

from benchmarks.measure import (
    accumulate_gradient,
    clock,
    environment,
    give_main_grad,
    interleave,
    peak_memory,
    take_gradients,
    world_of_one,
)
from benchmarks.peer import PEERLayer

logger = logging.getLogger(__name__)

_HEADS = 8  # as in PEER's paper; K is divided among them
_MIB = 2**20


def add_arguments(parser) -> None:
    parser.add_argument("--experts", type=int, default=65_536, help="number of experts E")
    parser.add_argument("--hidden", type=int, default=512, help="hidden size H")
    parser.add_argument("--tokens", type=int, default=4096, help="tokens T")
    parser.add_argument("--topk", type=int, default=64, help="experts per token K")
    parser.add_argument("--ffn", type=int, default=1, help="rows of an expert F; the rival has one")
    parser.add_argument("--no-rival", action="store_true", help="time and measure AIR-MoE alone")


def run(args) -> list[dict]:
    """Check both layers, time them in turn in one process, and measure the peak memory of each in a fresh one.

    A step is forward and backward. Both layers' weights have a ``main_grad`` as in Megatron. Peak memory is what a step
    needs beside weights and these buffers; in a column of its own, what one needs that also rebuilds the shortlists.
    """
    names = ["AIRMoELayer"] if args.no_rival else ["AIRMoELayer", "PEERLayer"]
    if "PEERLayer" in names and args.ffn != 1:
        raise ValueError(f"--ffn ({args.ffn}) must be 1 for PEER, or add --no-rival")
    peaks = {}
    for name in names:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            peaks[name] = pool.apply(_measure_peak, (name, args))
        logger.info("%s: %.0f MiB beside weights and gradients", name, peaks[name][0] / _MIB)
    device, pg_collection = world_of_one()
    gate_layer(pg_collection, device)
    gate_peer(device)
    layers = {name: make_layer(name, args, pg_collection, device) for name in names}
    hidden, grad = _inputs(args, device)
    settle_layer(layers["AIRMoELayer"], hidden)
    timings = interleave(
        {name: partial(_step, layer, hidden, grad) for name, layer in layers.items()}, args.repetitions, args.warmup
    )
    reference = timings[names[-1]]["total"].median
    rows = []
    for name, phases in timings.items():
        row = {"contender": name, "experts": args.experts, "hidden": args.hidden, "tokens": args.tokens}
        row |= {"topk": args.topk, "ffn": args.ffn}
        for phase in ("forward", "backward", "total"):
            row |= phases[phase].columns(phase)
        row["times_faster"] = "" if args.no_rival else round(reference / phases["total"].median, 2)
        step_peak, rebuild_peak = peaks[name]
        row["peak_mib"] = round(step_peak / _MIB)
        row["peak_with_rebuild_mib"] = "" if rebuild_peak is None else round(rebuild_peak / _MIB)
        rows.append(row | {"repetitions": args.repetitions} | environment(device))
    torch.distributed.destroy_process_group()
    return rows


def make_layer(name, args, pg_collection, device):
    """The contender, on the device, with main_grad buffers."""
    if name == "PEERLayer":
        torch.manual_seed(0)
        # The smallest keys that are usual: the rival's router should not be what makes it slow.
        layer = PEERLayer(args.hidden, args.experts, _HEADS, args.topk // _HEADS, key_size=args.hidden // 8)
    else:
        layer = _air_layer(args, pg_collection)
    layer = layer.to(device)
    give_main_grad(layer)
    return layer


def _air_layer(args, pg_collection):
    from megatron.core.transformer.moe.moe_layer import MoESubmodules

    from air_moe_megatron import AIRMoEConfig, AIRMoELayer, AIRRouter
    from air_moe_megatron.experts import GranularExperts

    config = AIRMoEConfig(
        num_layers=1,
        hidden_size=args.hidden,
        num_attention_heads=4,
        num_moe_experts=args.experts,
        moe_ffn_hidden_size=args.ffn,
        moe_router_topk=args.topk,
        moe_router_load_balancing_type="none",
        moe_router_dtype="fp32",
        add_bias_linear=False,
        moe_router_type="air",
        moe_dispatch="compact",
        moe_granular_experts=True,
    )
    layer = AIRMoELayer(config, MoESubmodules(experts=GranularExperts, router=AIRRouter), 1, pg_collection)
    layer.set_layer_number(1)
    return layer


def settle_layer(layer, hidden):
    """Let the codebook see the tokens a few times, as in training, so that its clusters and lists are real."""
    from air_moe_megatron.sync import update_codebooks

    for _ in range(3):
        layer(hidden)
        update_codebooks(layer)
    with torch.no_grad():
        layer(hidden)  # rebuilds the lists, so that no step does


def _inputs(args, device):
    generator = torch.Generator().manual_seed(0)
    shape = (args.tokens, 1, args.hidden)
    return [torch.randn(shape, generator=generator).to(device) for _ in range(2)]


def _step(layer, hidden, grad):
    hidden = hidden.detach().requires_grad_()
    start = clock(hidden.device)
    out = layer(hidden)
    out = out[0] if isinstance(out, tuple) else out
    middle = clock(hidden.device)
    out.backward(grad)
    accumulate_gradient(layer)
    end = clock(hidden.device)
    return {"forward": middle - start, "backward": end - middle, "total": end - start}


def _measure_peak(name, args):
    device, pg_collection = world_of_one()
    layer = make_layer(name, args, pg_collection, device)
    for parameter in layer.parameters():
        parameter.main_grad.fill_(0.0)  # so that its memory is in use already
    hidden, grad = _inputs(args, device)
    if name == "AIRMoELayer":
        settle_layer(layer, hidden)
    peak = peak_memory(lambda: _step(layer, hidden, grad), device)
    if name != "AIRMoELayer":
        return peak, None
    from air_moe_megatron.sync import update_codebooks

    update_codebooks(layer)  # so that the next forward rebuilds the lists
    return peak, peak_memory(lambda: _step(layer, hidden, grad), device)


def gate_layer(pg_collection, device):
    """No time is reported by a layer that is wrong: output and gradients against a direct computation of its routes."""
    sizes = argparse.Namespace(experts=256, hidden=32, tokens=100, topk=8, ffn=1)
    layer = make_layer("AIRMoELayer", sizes, pg_collection, device)
    hidden, grad = _inputs(sizes, device)
    settle_layer(layer, hidden)
    take_gradients(layer)
    tokens = hidden.clone().requires_grad_()
    out = layer(tokens)[0]
    out.backward(grad)
    found = [out, tokens.grad, *take_gradients(layer)]

    exact = hidden.clone().requires_grad_()
    router, experts = layer.router, layer.experts
    ids = router.route(hidden).topk_ids.long()
    flat = exact.view(-1, sizes.hidden)
    probs = torch.einsum("th,tkh->tk", flat, router.weight[ids]).softmax(dim=1)
    inputs = torch.einsum("th,tkfh->tkf", flat, experts.weight1[ids])
    values = torch.nn.functional.gelu(inputs) * probs.unsqueeze(2)
    expected = torch.einsum("tkf,tkfh->th", values, experts.weight2[ids]).view_as(exact)
    weights = [router.weight, experts.weight1, experts.weight2]
    gradients = torch.autograd.grad(expected, [exact, *weights], grad)
    names = ("output", "input grad", "router grad", "weight1 grad", "weight2 grad")
    for name, wanted, got in zip(names, [expected, *gradients], found, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5, msg=partial("{}: {}".format, name))
    logger.info("gate passed: AIRMoELayer equals a direct computation of its routes")


def gate_peer(device):
    """The rival must find the best of all its experts."""
    torch.manual_seed(0)
    peer = PEERLayer(32, 400, 2, 4, key_size=8).to(device)
    hidden = torch.randn(50, 32, device=device)
    _, found = peer.route(hidden)
    queries = peer.queries(hidden).view(50, 2, 2, 8)
    halves = torch.einsum("tphd,hnpd->pthn", queries, peer.keys)
    every = (halves[0].unsqueeze(-1) + halves[1].unsqueeze(-2)).flatten(-2)
    torch.testing.assert_close(found, every.topk(4, dim=-1).values)
    logger.info("gate passed: PEERLayer finds the best of all its experts")
