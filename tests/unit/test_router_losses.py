"""Losses of every router that has them, against naive references in fp64 on the logits that the router made.

Microbatches and sequences differ in the tokens that count, which is where Megatron's own functions are not right.
"""

from contextlib import contextmanager

import pytest
import torch

from air_moe_megatron.routers.losses import RouterLosses
from air_moe_megatron.routers.vq import VQRouter
from tests.builders import EXPERTS, HIDDEN, make_router

pytestmark = pytest.mark.usefixtures("megatron_cpu")

COEFF = 0.3
# fp32 sums of N candidates and T tokens in another order, against fp64.
CLOSE = dict(rtol=1e-4, atol=1e-6)

ROUTERS = {
    "topk": dict(moe_router_type="topk"),
    "air": dict(moe_router_type="air", moe_air_num_clusters=4, moe_air_shortlist_size=24),
    "air-probes": dict(
        moe_router_type="air", moe_air_num_clusters=8, moe_air_shortlist_size=16, moe_air_num_probes=3
    ),
    "air-experts": dict(
        moe_router_type="air", moe_air_num_clusters=8, moe_air_shortlist_size=16, moe_air_num_probes=3,
        moe_air_codebook_source="experts",
    ),
    "product-key": dict(  # batch norms over two tokens would lose the digits that are compared
        moe_router_type="product_key", moe_product_key_heads=2, moe_product_key_dim=6,
        moe_product_key_query_norm="layernorm",
    ),
    "hierarchical": dict(moe_router_type="hierarchical", moe_hierarchical_topk_groups=3),
    "vq": dict(moe_router_type="vq"),
}  # fmt: skip
BALANCED = {name: fields for name, fields in ROUTERS.items() if name != "vq"}
KINDS = {
    "aux_loss": "load_balancing_loss",
    "seq_aux_loss": "seq_load_balancing_loss",
    "global_aux_loss": "global_load_balancing_loss",
}
PATHS = {
    "compact": dict(moe_dispatch="compact", moe_granular_experts=True),
    "stock": dict(moe_dispatch="stock", moe_granular_experts=True),
}
per_token_too = pytest.mark.parametrize("per_token", (False, True), ids=("mean", "per-token-loss"))
every_balanced_router = pytest.mark.parametrize("router_fields", BALANCED.values(), ids=BALANCED)
every_kind = pytest.mark.parametrize("kind", KINDS)


# The reference.


def naive_balancing(router, logits, ids, tokens, seen=None):
    """``E * sum_e share_e * mean score_e`` of some tokens, in fp64, without its coefficient.

    Args:
        logits, ids: [T, N] of all tokens; ids None if the candidates are all experts in order.
        tokens: indices of those that the loss is of.
        seen: indices of the tokens whose selections give the shares; None for the same.
    """
    num_heads = getattr(router.sizes, "num_heads", 1) if hasattr(router, "sizes") else 1
    selections = torch.zeros(EXPERTS, dtype=torch.float64)
    total = torch.zeros(EXPERTS, dtype=torch.float64)
    ids = torch.arange(EXPERTS).expand_as(logits) if ids is None else ids
    for token in tokens if seen is None else seen:
        for values, experts in zip(logits[token].chunk(num_heads), ids[token].chunk(num_heads), strict=True):
            best = experts[values.detach().topk(router.topk // num_heads).indices]
            for expert in best[best >= 0].tolist():
                selections[expert] += 1
    for token in tokens:
        for values, experts in zip(logits[token].chunk(num_heads), ids[token].chunk(num_heads), strict=True):
            scores = values.double().softmax(dim=0)[experts >= 0] / num_heads
            total = total.index_add(0, experts[experts >= 0], scores)
    return EXPERTS * (selections / selections.sum().clamp_min(1) * total / max(1, len(tokens))).sum()


def naive_z(logits, tokens):
    return sum((logits[token].double().logsumexp(dim=0).square() for token in tokens), torch.zeros(())) / max(
        1, len(tokens)
    )


def naive_vq(router, hidden, code_ids, tokens):
    codes, hidden = router.codes[code_ids[tokens]].double(), hidden[tokens].unsqueeze(1).double()
    if not len(tokens):
        return torch.zeros((), dtype=torch.float64)
    commitment = router.config.moe_vq_commitment
    return (codes - hidden.detach()).square().mean() + commitment * (codes.detach() - hidden).square().mean()


def weighted(losses, counts, per_token):
    """The mean of the losses of microbatches or sequences, or that of their tokens."""
    weights = torch.tensor(counts, dtype=torch.float64) if per_token else torch.ones(len(losses))
    return sum(weight * loss for weight, loss in zip(weights, losses, strict=True)) / weights.sum()


@contextmanager
def captured(monkeypatch_context, cls, name, index):
    """What a method of the routers is given, one list of arguments per call."""
    calls, original = [], getattr(cls, name)

    def method(self, *args, **kwargs):
        calls.append(args[index])
        return original(self, *args, **kwargs)

    with monkeypatch_context.context() as patch:
        patch.setattr(cls, name, method)
        yield calls


# Runs.


def mask_of(counts, sequence=8):
    """[S, B] bool: of each sequence b all but ``counts[b]`` tokens are padding."""
    return torch.stack([torch.randperm(sequence) >= count for count in counts], dim=1)


def tokens_of(mask, sequence=None):
    """Indices of the tokens t = s*B + b that count, of one sequence b or of all."""
    keep = ~mask.clone()
    if sequence is not None:
        keep[:, torch.arange(mask.shape[1]) != sequence] = False
    return keep.flatten().nonzero().flatten().tolist()


def forward(router, hidden, mask):
    """The probs, dense or compact, of one microbatch."""
    return router(hidden, mask)[0]


def logged(name):
    from air_moe_megatron.compat import get_moe_metrics_tracker

    return get_moe_metrics_tracker().metrics[name].values


def forget_logs():
    from air_moe_megatron.compat import destroy_moe_metrics_tracker

    destroy_moe_metrics_tracker()


def run(monkeypatch, router, masks, method, scale=1.0):
    """Forward and backward of the microbatches: parameters, gradients of the losses, and what the method was given."""
    forget_logs()
    torch.manual_seed(3)
    inputs = [torch.randn(*mask.shape, HIDDEN, requires_grad=True) for mask in masks]
    parameters = [parameter for parameter in router.parameters() if parameter.requires_grad]
    gradients = [0.0] * len(parameters)
    with captured(monkeypatch, *method, slice(None)) as calls:
        for hidden, mask in zip(inputs, masks, strict=True):
            probs = forward(router, hidden, mask)
            found = torch.autograd.grad(
                (0.0 * probs).sum(), [hidden, *parameters], retain_graph=True, allow_unused=True
            )
            assert all(value is None or value.isfinite().all() for value in found)
            gradients = [a + (0.0 if b is None else scale * b) for a, b in zip(gradients, found[1:], strict=True)]
    return parameters, gradients, calls


def assert_gradients(parameters, gradients, loss):
    expected = torch.autograd.grad(COEFF * loss, parameters, allow_unused=True)
    assert max(value.abs().max() for value in expected if value is not None) > 1e-5  # the test sees something
    for found, wanted in zip(gradients, expected, strict=True):
        wanted = torch.zeros(()) if wanted is None else wanted
        torch.testing.assert_close(torch.as_tensor(found), wanted.expand_as(torch.as_tensor(found)), **CLOSE)


AUX = (RouterLosses, "_attach_aux_losses")


def balanced_router(groups, router_fields, kind, per_token, **fields):
    fields = {"calculate_per_token_loss": per_token, **fields}
    return make_router(groups, moe_router_load_balancing_type=kind, moe_aux_loss_coeff=COEFF, **router_fields, **fields)


@pytest.mark.parametrize("path", PATHS)
@per_token_too
@every_kind
@every_balanced_router
def test_microbatches_of_6_2_and_4_tokens_and_one_without_any(
    megatron_cpu, monkeypatch, router_fields, kind, per_token, path
):
    counts = (6, 2, 0, 4)
    router = balanced_router(megatron_cpu, router_fields, kind, per_token, **PATHS[path])
    masks = [mask_of([count]) for count in counts]
    scale = 1 / sum(counts) if per_token else 1 / len(counts)
    parameters, gradients, calls = run(monkeypatch, router, masks, AUX, scale)
    losses, seen = [], []
    logits = torch.cat([logits for _, logits, *_ in calls])
    ids = None if calls[0][2] is None else torch.cat([ids for _, _, ids, *_ in calls])
    for i, mask in enumerate(masks):
        tokens = [8 * i + token for token in tokens_of(mask)]
        seen += tokens
        losses.append(naive_balancing(router, logits, ids, tokens, seen if kind == "global_aux_loss" else None))
    assert_gradients(parameters, gradients, weighted(losses, counts, per_token))
    torch.testing.assert_close(logged(KINDS[kind])[0].double(), sum(losses).detach(), **CLOSE)


@per_token_too
@every_balanced_router
def test_sequences_of_6_2_and_0_tokens_weigh_as_microbatches_of_their_own(
    megatron_cpu, monkeypatch, router_fields, per_token
):
    counts = (6, 2, 0)
    router = balanced_router(megatron_cpu, router_fields, "seq_aux_loss", per_token)
    mask = mask_of(counts)
    parameters, gradients, calls = run(monkeypatch, router, [mask], AUX, 1 / 8 if per_token else 1.0)
    ((_, logits, ids, *_),) = calls
    losses = [naive_balancing(router, logits, ids, tokens_of(mask, sequence)) for sequence in range(3)]
    assert_gradients(parameters, gradients, weighted(losses, counts, per_token))
    wanted = weighted(losses, counts, per_token=False)
    torch.testing.assert_close(logged("seq_load_balancing_loss")[0].double(), wanted.detach(), **CLOSE)


@per_token_too
@pytest.mark.parametrize("router_fields", ROUTERS.values(), ids=ROUTERS)
def test_z_loss_of_microbatches_of_6_2_0_and_4_tokens(megatron_cpu, monkeypatch, router_fields, per_token):
    counts = (6, 2, 0, 4)
    router = make_router(
        megatron_cpu, moe_z_loss_coeff=COEFF, calculate_per_token_loss=per_token, moe_vq_loss_coeff=1e-30,
        **router_fields,
    )  # fmt: skip
    masks = [mask_of([count]) for count in counts]
    scale = 1 / sum(counts) if per_token else 1 / len(counts)
    parameters, gradients, calls = run(monkeypatch, router, masks, (RouterLosses, "apply_z_loss"), scale)
    losses = [naive_z(logits, tokens_of(mask)) for (logits, *_), mask in zip(calls, masks, strict=True)]
    assert_gradients(parameters, gradients, weighted(losses, counts, per_token))
    torch.testing.assert_close(logged("z_loss")[0].double(), sum(losses).detach(), **CLOSE)


@per_token_too
def test_vq_loss_of_microbatches_of_6_2_0_and_4_tokens(megatron_cpu, monkeypatch, per_token):
    counts = (6, 2, 0, 4)
    router = make_router(
        megatron_cpu, moe_router_type="vq", moe_vq_loss_coeff=COEFF, calculate_per_token_loss=per_token
    )
    masks = [mask_of([count]) for count in counts]
    scale = 1 / sum(counts) if per_token else 1 / len(counts)
    parameters, gradients, calls = run(monkeypatch, router, masks, (VQRouter, "_attach_vq_loss"), scale)
    losses = [
        naive_vq(router, hidden, code_ids, tokens_of(mask))
        for (_, hidden, code_ids, _), mask in zip(calls, masks, strict=True)
    ]
    assert_gradients(parameters, gradients, weighted(losses, counts, per_token))
    torch.testing.assert_close(logged("vq_loss")[0].double(), sum(losses).detach(), **CLOSE)


@per_token_too
@every_balanced_router
def test_a_nan_in_a_padding_token_reaches_no_loss(megatron_cpu, monkeypatch, router_fields, per_token):
    """The losses alone; what comes before them must keep it away from the probs."""
    kinds = list(KINDS)
    router = make_router(
        megatron_cpu, moe_z_loss_coeff=COEFF, calculate_per_token_loss=per_token, **router_fields,
        moe_router_load_balancing_type=kinds, moe_aux_loss_coeff=[COEFF] * 3,
    )  # fmt: skip
    mask = mask_of((6, 2))
    _, _, calls = run(monkeypatch, router, [mask], AUX)
    _, logits, ids, _, _, *columns = calls[0]
    found = []
    for value in (0.0, float("nan"), float("inf")):
        forget_logs()
        router.reset_global_aux_loss_tracker()
        leaf = torch.where(mask.view(-1, 1), value, logits.detach()).requires_grad_()
        # A router's own z-loss may be that of other logits than these.
        attached = RouterLosses.apply_z_loss(router, leaf, padding_mask=mask.flatten())
        probs = torch.zeros(16, 4, requires_grad=True)
        probs = router._attach_aux_losses(probs, attached, ids, mask.flatten(), 2, *columns)
        probs.sum().backward(retain_graph=True)
        attached.backward(torch.zeros_like(attached))
        found.append([leaf.grad, *(logged(name)[0].clone() for name in (*KINDS.values(), "z_loss"))])
    assert found[0][0].abs().max() > 1e-4
    for values in found[1:]:
        for a, b in zip(values, found[0], strict=True):
            assert torch.equal(a, b)


def test_a_nan_in_a_padding_token_does_not_reach_the_vq_loss(megatron_cpu):
    router = make_router(megatron_cpu, moe_router_type="vq")
    padding_mask, found = torch.arange(6) == 2, []
    for value in (0.0, float("nan")):
        hidden = torch.ones(6, HIDDEN)
        hidden[2] = value
        hidden.requires_grad_()
        probs = router._attach_vq_loss(torch.zeros(6, 4), hidden, torch.arange(12).view(6, 2), padding_mask)
        found.append(torch.autograd.grad(probs.sum(), [hidden, router.codes]))
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b) and a.abs().max() > 1e-5


@per_token_too
@pytest.mark.parametrize("router_fields", ROUTERS.values(), ids=ROUTERS)
def test_a_repeated_mtp_layer_has_its_part_of_every_loss_and_logs_it(
    megatron_cpu, monkeypatch, router_fields, per_token
):
    """The layer runs ``mtp_num_layers`` times for a microbatch."""
    kinds = ["none"] if router_fields["moe_router_type"] == "vq" else list(KINDS)
    found = []
    for is_mtp_layer in (False, True):
        router = make_router(
            megatron_cpu, moe_z_loss_coeff=COEFF, calculate_per_token_loss=per_token, **router_fields,
            moe_router_load_balancing_type=kinds, moe_aux_loss_coeff=[COEFF] * len(kinds), mtp_num_layers=2,
            mtp_use_repeated_layer=True,
        )  # fmt: skip
        router.is_mtp_layer = is_mtp_layer
        torch.manual_seed(5)
        _, gradients, _ = run(monkeypatch, router, [mask_of((6, 2))], (RouterLosses, "apply_z_loss"))
        names = ["z_loss", "vq_loss"] if kinds == ["none"] else ["z_loss", *KINDS.values()]
        found.append((gradients, {name: logged(name).tolist() for name in names}))
    (gradients, logs), (half_gradients, half_logs) = found
    for whole, half in zip(gradients, half_gradients, strict=True):
        torch.testing.assert_close(torch.as_tensor(half), torch.as_tensor(whole) / 2, rtol=1e-5, atol=1e-7)
    for name, (first, *rest) in logs.items():
        assert first > 0 and rest == [0.0, 0.0]
        assert half_logs[name] == [0.0, pytest.approx(first / 2), 0.0]  # after the decoder's only layer


@every_balanced_router
def test_a_recomputed_forward_counts_once_and_keeps_the_first_ones_gradient(megatron_cpu, router_fields):
    """``torch.utils.checkpoint`` without re-entrance: the first graph goes backward with the second one's tensors."""
    from torch.utils.checkpoint import checkpoint

    found = []
    for recomputed in (False, True):
        router = make_router(
            megatron_cpu, moe_z_loss_coeff=COEFF, **router_fields,
            moe_router_load_balancing_type=list(KINDS), moe_aux_loss_coeff=[COEFF] * 3,
        )  # fmt: skip
        forget_logs()
        torch.manual_seed(4)
        masks = [mask_of((6, 2)), mask_of((3, 7))]
        inputs = [torch.randn(8, 2, HIDDEN, requires_grad=True) for _ in masks]
        probs = [
            checkpoint(forward, router, hidden, mask, use_reentrant=False)
            if recomputed
            else forward(router, hidden, mask)
            for hidden, mask in zip(inputs, masks, strict=True)
        ]
        for value in probs:
            (0.0 * value).sum().backward()
        counts = router.global_tokens_per_expert.clone()
        logs = [logged(name).clone() for name in (*KINDS.values(), "z_loss")]
        found.append((counts, *logs, *(parameter.grad for parameter in router.parameters())))
    assert found[0][0].sum() == 18 * 4
    for once, twice in zip(*found, strict=True):
        assert torch.equal(once, twice)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@every_kind
@every_balanced_router
def test_no_tokens_at_all(megatron_cpu, router_fields, kind, dtype):
    router = balanced_router(megatron_cpu, router_fields, kind, False, moe_z_loss_coeff=COEFF).to(dtype)
    hidden = torch.zeros(0, 2, HIDDEN, dtype=dtype, requires_grad=True)
    forward(router, hidden, None).sum().backward()
    assert hidden.grad.shape == hidden.shape
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in router.parameters())


@pytest.mark.parametrize("router_fields", ROUTERS.values(), ids=ROUTERS)
def test_the_default_dtype_changes_no_loss(megatron_cpu, router_fields):
    """As in frameworks that set it to bf16."""
    kinds = ["none"] if router_fields["moe_router_type"] == "vq" else list(KINDS)
    router = make_router(
        megatron_cpu, moe_z_loss_coeff=COEFF, **router_fields,
        moe_router_load_balancing_type=kinds, moe_aux_loss_coeff=[COEFF] * len(kinds),
    )  # fmt: skip
    mask, found = mask_of((6, 2)), []
    torch.manual_seed(3)
    hidden = torch.randn(*mask.shape, HIDDEN)
    for dtype in (torch.float32, torch.bfloat16):
        if router.global_tokens_per_expert is not None:
            router.reset_global_aux_loss_tracker()
        router.zero_grad()
        torch.set_default_dtype(dtype)
        try:
            (0.0 * forward(router, hidden, mask)).sum().backward()
        finally:
            torch.set_default_dtype(torch.float32)
        found.append([parameter.grad for parameter in router.parameters() if parameter.grad is not None])
    assert found[0]
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)
