"""Correctness checks: each case is compared with a direct computation before it is timed.

Each case is checked twice: at small sizes in fp32, and for some tokens at the timed sizes and in the timed dtype.
"""

import logging
from functools import partial

import torch

from benchmarks.measure import take_gradients
from benchmarks.models import Sizes, inputs, make_layer, make_router, warm_up_codebook

logger = logging.getLogger(__name__)

_RMS_RATIO = 0.02  # tolerance for values rounded to bf16, against fp32


def same(name: str, found: torch.Tensor, expected: torch.Tensor, rtol=1e-4, atol=1e-5, narrow_ratio=None) -> None:
    """Raise if two results differ: elementwise in fp32, by the RMS ratio if one has a narrower dtype.

    Args:
        narrow_ratio: tolerated RMS of the error over that of the values. If given, it also applies to fp32 results that
            were computed from narrower numbers.
    """
    if found.dtype == torch.float32 == expected.dtype and narrow_ratio is None:
        torch.testing.assert_close(found, expected, rtol=rtol, atol=atol, msg=partial("{}: {}".format, name))
        return
    error = (found.float() - expected.float()).square().mean().sqrt()
    size = expected.float().square().mean().sqrt()
    if not error <= (narrow_ratio or _RMS_RATIO) * size:
        raise AssertionError(f"{name}: an RMS of {float(error)} away from values of {float(size)}")


def check_router(pg_collection, device) -> None:
    """With full lists AIRRouter must equal TopKRouter."""
    sizes = Sizes(experts=96, hidden=32, tokens=200, topk=8, clusters=6, shortlist=96, candidates=96)
    fields = {"moe_router_input_norm": "none"}  # TopKRouter has no norm
    topk, air = (make_router(kind, sizes, pg_collection, device, **fields) for kind in ("topk", "air"))
    with torch.no_grad():
        air.weight.copy_(topk.weight)
    hidden, grad = inputs(sizes, device, (sizes.tokens, 1, sizes.hidden), (sizes.tokens, sizes.experts))
    warm_up_codebook(air, hidden)
    results = []
    for router in (topk, air):
        tokens = hidden.clone().requires_grad_()
        probs, routing_map = router(tokens)
        probs.backward(grad)
        results.append((routing_map.float(), probs, tokens.grad, *take_gradients(router)))
    tolerances = {"routing map": 0.0, "probs": 1e-6, "input grad": 1e-6, "weight grad": 1e-5}  # a sum over tokens
    for (name, atol), expected, found in zip(tolerances.items(), *results, strict=True):
        same(name, found, expected, atol=atol)
    logger.info("check passed: with full lists AIRRouter equals TopKRouter")


def check_at_size(air, hidden: torch.Tensor, num_checked: int = 64) -> None:
    """Compare experts, probabilities and gradients of some tokens with a direct computation, at the timed sizes.

    This is done in evaluation mode, where no balancing loss adds to the gradients. A training step must select the same
    experts.
    """
    tokens = hidden[:, 0].clone().requires_grad_()
    with torch.no_grad():
        trained = air.route(tokens)
    take_gradients(air)
    routes = air.eval().route(tokens)
    air.train()
    # Of tied experts either may be chosen, so only the probabilities are compared.
    same("probs of a training step", *(found.probs.sort(dim=1).values for found in (trained, routes)))
    every = max(1, tokens.shape[0] // num_checked)
    grad = torch.zeros_like(routes.probs)
    grad[::every] = torch.randn_like(grad[::every])
    routes.probs.backward(grad)
    weight_grad = take_gradients(air)[0]

    exact = hidden[::every, 0].float().requires_grad_()
    ids = routes.topk_ids[::every].long()
    candidates = air.index.shortlist[routes.probed[::every]].flatten(1).long()  # [checked, P * L]
    with torch.no_grad():
        scores = _scores(_normalized(air, exact), air.weight, candidates)
        ordered, slots = candidates.sort(dim=1)
        is_repeated = torch.nn.functional.pad(ordered.diff(dim=1) == 0, (1, 0))  # an expert in several lists
        best = scores.gather(1, slots).masked_fill(is_repeated, float("-inf")).topk(air.topk, dim=1).values
        chosen = _scores(_normalized(air, exact), air.weight, ids)
    tolerance = (1e-5 if tokens.dtype == torch.float32 else _RMS_RATIO) * scores.square().mean().sqrt()
    are_distinct = (ids.sort(dim=1).values.diff(dim=1) > 0).all()
    are_listed = all(torch.isin(row, allowed).all() for row, allowed in zip(ids, candidates, strict=True))
    if not are_distinct or not are_listed or (chosen.sort(dim=1, descending=True).values < best - tolerance).any():
        raise AssertionError("the experts of some tokens are not the best of their shortlists")
    weight = air.weight[ids].float().detach().requires_grad_()  # [checked, K, H]
    scale = air.config.moe_router_topk_scaling_factor
    probs = scale * torch.einsum("th,tkh->tk", _normalized(air, exact), weight).softmax(dim=1)
    probs.backward(grad[::every].float())
    expected = torch.zeros_like(weight_grad).index_add_(0, ids.flatten(), weight.grad.flatten(0, 1))
    # Tokens that are not fp32 are rounded once more when they are normalized.
    same("probs", routes.probs[::every], probs, narrow_ratio=None if tokens.dtype == torch.float32 else _RMS_RATIO)
    same("input grad", tokens.grad[::every], exact.grad)
    same("weight grad", weight_grad.to(tokens.dtype), expected)
    logger.info("check passed: %d tokens at the timed sizes equal a direct computation", ids.shape[0])


def _normalized(router, tokens):
    """[T, H] tokens as the router scores them."""
    norm = getattr(router, "input_norm", None)  # Megatron's router has none
    if norm is None:
        return tokens
    if not hasattr(norm, "covariance"):
        scaled = (tokens - norm.mean) / (norm.variance + 1e-5).sqrt().float()
        return _whitened_along(norm.basis, norm.eigenvalues, scaled) if hasattr(norm, "basis") else scaled
    deviations = (norm.covariance.diagonal().double() + 1e-5).sqrt()
    correlations = norm.covariance.double() / deviations / deviations.unsqueeze(1)
    correlations.diagonal().fill_(1.0)
    half = correlations / 2 + torch.eye(len(deviations), device=deviations.device, dtype=torch.float64) / 2
    whitening = torch.linalg.inv(torch.linalg.cholesky(half)) / deviations
    return (tokens - norm.mean) @ whitening.t().float()


def _whitened_along(basis, eigenvalues, tokens):
    """[T, H] tokens with each direction of the basis, and the rest, divided by its own deviation after shrinkage."""
    hidden_size, rank = basis.shape
    shrunk = (eigenvalues + 1.0) / 2.0
    of_rest = (hidden_size - shrunk.sum()) / (hidden_size - rank)
    along = tokens @ basis
    return (tokens - along @ basis.t()) / of_rest.sqrt() + along / shrunk.sqrt() @ basis.t()


def _scores(tokens, weight, ids):
    """[checked, n] scores of the experts ``ids`` [checked, n], gathered for a few tokens at a time."""
    rows = zip(tokens, ids, strict=True)
    return torch.stack([weight[experts].float() @ token for token, experts in rows])


def check_product_keys(pg_collection, device) -> None:
    """The product-key baseline must find the best of all its experts."""
    sizes = Sizes(experts=400, hidden=32, tokens=50, topk=16)
    router = make_router("product_key", sizes, pg_collection, device)
    (hidden,) = inputs(sizes, device, (sizes.tokens, sizes.hidden))
    _, found = router.route(hidden)
    queries = router.queries(hidden).view(sizes.tokens, 2, router.num_heads, router.key_size)
    halves = torch.einsum("tphd,hnpd->pthn", queries, router.keys)
    every = (halves[0].unsqueeze(-1) + halves[1].unsqueeze(-2)).flatten(-2)
    same("scores", found, every.topk(router.topk, dim=-1).values)
    logger.info("check passed: product keys find the best of all their experts")


def check_peer(pg_collection, device) -> None:
    """Compare output and gradients of a PEER layer with a dense computation, in which every expert has a score."""
    sizes = Sizes(experts=400, hidden=32, tokens=50, topk=16)
    layer = make_layer("PEERLayer", sizes, pg_collection, device)
    (hidden,) = inputs(sizes, device, (sizes.tokens, 1, sizes.hidden))
    grad = hidden.flip(0)
    tokens = hidden.clone().requires_grad_()
    out = layer(tokens)
    out.backward(grad)
    found = [out, tokens.grad, *take_gradients(layer)]

    exact = hidden.clone().requires_grad_()
    expected = _dense_peer(layer, exact.view(-1, sizes.hidden)).view_as(exact)
    names, parameters = zip(*layer.named_parameters(), strict=True)
    wanted = [expected, *torch.autograd.grad(expected, [exact, *parameters], grad)]
    for name, own, other in zip(("output", "input grad", *names), found, wanted, strict=True):
        same(name, own, other)
    logger.info("check passed: PEERLayer equals a dense computation over all its experts")


def _dense_peer(layer, tokens):
    """[T, H] output of a PEER layer for tokens [T, H], from the scores of all experts by every head."""
    queries = torch.nn.functional.linear(tokens, layer.queries.weight)
    queries = queries.view(len(tokens), 2, layer.num_heads, layer.key_size)
    first, second = (  # [T, heads, N] of each half
        torch.einsum("thd,hnd->thn", queries[:, half], layer.keys[:, :, half]) for half in (0, 1)
    )
    scores = (first.unsqueeze(3) + second.unsqueeze(2)).flatten(2)  # [T, heads, E]
    selected = torch.zeros_like(scores, dtype=torch.bool).scatter_(2, scores.topk(layer.topk, dim=2).indices, True)
    probs = scores.masked_fill(~selected, float("-inf")).softmax(dim=2).sum(dim=1)  # [T, E]
    values = torch.nn.functional.gelu(tokens @ layer.down.weight.t()) * probs
    return values @ layer.up.weight


def check_layer(kind: str, pg_collection, device) -> None:
    """Compare output and gradients of a layer with a direct computation by its routes."""
    sizes = Sizes(experts=256, hidden=32, tokens=100, topk=8)
    layer = make_layer(kind, sizes, pg_collection, device)
    shape = (sizes.tokens, 1, sizes.hidden)
    hidden, grad = inputs(sizes, device, shape, shape)
    router, experts = layer.router, layer.experts
    if kind == "AIRMoELayer":
        warm_up_codebook(router, hidden)
    if kind != "MoELayer":
        ids = router.route(hidden).topk_ids.long()
    else:
        ids = (hidden.view(-1, sizes.hidden) @ router.weight.t()).topk(sizes.topk, dim=1).indices
    take_gradients(layer)
    layer.eval()  # without the gradients of a balancing loss
    tokens = hidden.clone().requires_grad_()
    out = layer(tokens)[0]
    out.backward(grad)
    found = [out, tokens.grad, *take_gradients(layer)]

    exact = hidden.clone().requires_grad_()
    flat = exact.view(-1, sizes.hidden)
    if kind == "HierarchicalMoELayer":  # the baseline's own gates
        probs = router.route(flat).probs
    else:
        scores = torch.einsum("th,tkh->tk", _normalized(router, flat), router.weight[ids])
        probs = router.config.moe_router_topk_scaling_factor * scores.softmax(dim=1)
    hidden_rows = torch.einsum("th,tkfh->tkf", flat, experts.weight1[ids])
    values = torch.nn.functional.gelu(hidden_rows) * probs.unsqueeze(2)
    expected = torch.einsum("tkf,tkfh->th", values, experts.weight2[ids]).view_as(exact)
    leaves = {"input": exact, "weight1": experts.weight1, "weight2": experts.weight2}
    by_name = {"input": found[1], "weight1": found[-2], "weight2": found[-1]}
    if kind != "HierarchicalMoELayer":
        leaves["router"], by_name["router"] = router.weight, found[2]
    same("output", found[0], expected)
    for name, wanted in zip(leaves, torch.autograd.grad(expected, list(leaves.values()), grad), strict=True):
        same(f"{name} grad", by_name[name], wanted)
    logger.info("check passed: %s equals a direct computation of its routes", kind)


def check_lists(router, index=None, num_checked: int = 16) -> None:
    """The lists of some codewords must hold the best experts there, and all lists together must hold every expert.

    Args:
        index: lists made from the router's codebook and centers; None means the router's own.
    """
    index = index or router.index
    reserved, shortlist = index.num_reserved, index.shortlist.long()
    every = max(1, shortlist.shape[0] // num_checked)
    scores = router.codebook.codewords[::every] @ router.weight.float().t()
    number = shortlist.shape[1] - reserved
    best = scores.topk(number, dim=1).values
    listed = scores.gather(1, shortlist[::every]).topk(number, dim=1).values
    same("scores of the lists", listed.to(router.weight.dtype), best)
    room = shortlist.shape[0] * reserved
    if room >= router.num_experts and shortlist.unique().numel() != router.num_experts:
        raise AssertionError("some experts are in no list")
    logger.info("check passed: the lists hold the best experts, and every expert")
