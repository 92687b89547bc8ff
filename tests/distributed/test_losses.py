"""Losses over two gloo ranks: logs and gradients are those of one rank on all tokens of the global batch.

The ranks run Megatron's schedule, its DistributedDataParallel and its finalize_model_grads around a router. Half of the
tokens are on each rank, and they count in unequal numbers. The references are naive, in fp64, on the logits that one
router makes of all tokens.
"""

from functools import partial

import pytest
import torch

from tests.processes import gloo_rank, parallel_groups, ranks_fixture

HIDDEN, EXPERTS, TOPK = 16, 32, 4
COEFF = 0.3
MICROBATCHES = 2
SEQUENCE, BATCH = 6, 2  # of the whole microbatch with a split sequence; of a rank's share with data parallelism
CLOSE = dict(rtol=2e-4, atol=2e-6)  # fp32 sums in another order, against fp64

LAYOUTS = {
    "DP2": {},
    "CP2": dict(context_parallel_size=2),
    "TP2-SP": dict(tensor_model_parallel_size=2, sequence_parallel=True, expert_tensor_parallel_size=1),
}
ROUTERS = {
    "topk": dict(moe_router_type="topk"),
    "air": dict(
        moe_router_type="air", moe_air_num_clusters=8, moe_air_shortlist_size=12, moe_air_num_probes=2,
        moe_air_codebook_source="experts",
    ),
    "product-key": dict(moe_router_type="product_key", moe_product_key_heads=2, moe_product_key_dim=6),
    "hierarchical": dict(moe_router_type="hierarchical", moe_hierarchical_topk_groups=3),
    "vq": dict(moe_router_type="vq"),
}  # fmt: skip
BALANCING = {
    "aux_loss": "load_balancing_loss",
    "seq_aux_loss": "seq_load_balancing_loss",
    "global_aux_loss": "global_load_balancing_loss",
}
LOSSES = {
    **{
        name: dict(moe_router_load_balancing_type=kind, moe_aux_loss_coeff=COEFF, moe_vq_loss_coeff=1e-30)
        for kind, name in BALANCING.items()
    },
    "z_loss": dict(moe_z_loss_coeff=COEFF, moe_vq_loss_coeff=1e-30),
    "vq_loss": dict(moe_vq_loss_coeff=COEFF),
}
CASES = [
    (router, loss, per_token)
    for router in ROUTERS
    for loss in (("z_loss", "vq_loss") if router == "vq" else (*BALANCING.values(), "z_loss"))
    for per_token in (False, True)
]


def make_router(groups, router, loss, per_token, layout=(), cls=None):
    from air_moe_megatron import AIRMoEConfig
    from air_moe_megatron.routers import ROUTERS as CLASSES

    config = AIRMoEConfig(
        num_layers=1, hidden_size=HIDDEN, num_attention_heads=2, num_moe_experts=EXPERTS, moe_router_topk=TOPK,
        moe_ffn_hidden_size=1, ffn_hidden_size=1, add_bias_linear=False, use_cpu_initialization=True,
        moe_router_dtype="fp32", moe_granular_experts=True, moe_dispatch="compact", init_method_std=0.5,
        calculate_per_token_loss=per_token,
        **{"moe_router_load_balancing_type": "none", **ROUTERS[router], **LOSSES[loss], **dict(layout)},
    )  # fmt: skip
    torch.manual_seed(0)
    router = (cls or CLASSES[config.moe_router_type])(config, groups)
    router.set_layer_number(1)
    return router


def microbatches(layout, rank=None):
    """[S, B, H] hidden states and [S, B] padding masks of each microbatch: of one rank, or of both."""
    generator = torch.Generator().manual_seed(7)
    shape = (SEQUENCE, 2 * BATCH) if layout == "DP2" else (SEQUENCE, BATCH)
    batches = []
    for number in range(MICROBATCHES):
        hidden = torch.randn(*shape, HIDDEN, generator=generator)
        mask = torch.rand(shape, generator=generator) < 0.3 + 0.3 * number
        mask[0], mask[:4, 1] = False, True  # the first rank has fewer that count
        if rank is not None:
            dim = 1 if layout == "DP2" else 0
            hidden, mask = (tensor.chunk(2, dim=dim)[rank].contiguous() for tensor in (hidden, mask))
        batches.append((hidden, mask))
    return batches


# The ranks.


def train_step(router, batches, num_tokens):
    """One global batch through Megatron's schedule, and the gradients as its optimizer would find them."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.enums import ModelType
    from megatron.core.pipeline_parallel.schedules import forward_backward_no_pipelining
    from megatron.core.transformer.module import MegatronModule

    from air_moe_megatron.compat import destroy_moe_metrics_tracker, get_moe_metrics_tracker

    class Model(MegatronModule):
        model_type = ModelType.encoder_or_decoder

        def __init__(self):
            super().__init__(router.config)
            self.router = router

        def set_input_tensor(self, input_tensor):
            pass

        def forward(self, hidden, mask):
            return 0.0 * self.router(hidden, mask)[0].sum()

    config = router.config
    config.finalize_model_grads_func = finalize_model_grads
    model = DistributedDataParallel(config, DistributedDataParallelConfig(), Model())
    model.zero_grad_buffer()
    numbers = iter(num_tokens)

    def forward_step(iterator, model):
        def loss_func(output):
            return output, torch.tensor(next(numbers), dtype=torch.int), {}

        return model(*next(iterator)), loss_func

    destroy_moe_metrics_tracker()
    forward_backward_no_pipelining(
        forward_step_func=forward_step, data_iterator=iter(batches), model=[model],
        num_microbatches=MICROBATCHES, seq_length=SEQUENCE, micro_batch_size=BATCH,
    )  # fmt: skip
    logs = {}

    class Writer:
        def add_scalar(self, name, value, iteration):
            logs[name] = value.clone()

    get_moe_metrics_tracker().report(1 / MICROBATCHES, 1, writer=Writer(), num_layers=1)
    gradients = {name: parameter.main_grad.clone() for name, parameter in router.named_parameters()}
    return gradients, logs


def train_steps(groups, layout, rank):
    """Gradients and logs of every case in a layout, and of topk without padding beside those of Megatron's router."""
    from megatron.core.transformer.moe.router import TopKRouter

    sizes, results = LAYOUTS[layout].items(), {}
    batches = microbatches(layout, rank)
    # What the main loss counts on this rank; with tensor parallelism it sees the whole sequence.
    whole = microbatches(layout) if layout == "TP2-SP" else batches
    num_tokens = [int((~mask).sum()) for _, mask in whole]
    for case in CASES:
        results[layout, case] = train_step(make_router(groups, *case, sizes), batches, num_tokens)
    unmasked = [(hidden, None) for hidden, _ in batches]
    num_tokens = [mask.numel() for _, mask in whole]
    for case in CASES:
        if case[0] == "topk":
            routers = [make_router(groups, *case, sizes, cls) for cls in (None, TopKRouter)]
            results[layout, "no padding", case] = [train_step(router, unmasked, num_tokens) for router in routers]
    return results


def worker(rank, world_size, directory):
    results = {}
    with gloo_rank(rank, world_size, directory):
        for layout, settings in LAYOUTS.items():
            sizes = {
                name: size
                for name, size in settings.items()
                if name.endswith("model_parallel_size") or "context" in name
            }
            with parallel_groups(**sizes) as groups:
                results |= train_steps(groups, layout, rank)
        torch.save(results, f"{directory}/{rank}.pt")


ranks = ranks_fixture(worker, 2)


# One rank on all tokens.


def parts_of(loss, layout, mask):
    """The tokens that count of each part of a microbatch which has a loss of its own, indices t = s*B + b."""
    indices = torch.arange(mask.numel()).view_as(mask)
    if loss == "seq_load_balancing_loss":
        parts = zip(indices.unbind(dim=1), mask.unbind(dim=1), strict=True)
    elif layout == "DP2" and loss != "global_load_balancing_loss":
        parts = zip(indices.chunk(2, dim=1), mask.chunk(2, dim=1), strict=True)
    else:
        parts = ((indices, mask),)
    return [part[~padded] for part, padded in parts]


def whole_batch(monkeypatch, router, loss, layout):
    """What one rank gives the method that makes the loss, joined over the microbatches; and their numbers of tokens."""
    from air_moe_megatron.routers.losses import RouterLosses
    from air_moe_megatron.routers.vq import VQRouter

    owner, name = {"z_loss": (RouterLosses, "apply_z_loss"), "vq_loss": (VQRouter, "_attach_vq_loss")}.get(
        loss, (RouterLosses, "_attach_aux_losses")
    )
    original, calls = getattr(owner, name), []

    def method(self, *args, **kwargs):
        calls.append(args)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(owner, name, method)
    batches = microbatches(layout)
    for hidden, mask in batches:
        router(hidden, mask)
    return calls, batches


def balance(router, logits, ids, tokens, seen):
    """``E * sum_e share_e * mean score_e`` of tokens, the shares being those of the tokens seen so far."""
    heads = router.sizes.num_heads if router.config.moe_router_type == "product_key" else 1
    ids = torch.arange(EXPERTS).expand_as(logits) if ids is None else ids
    ids = torch.where(ids < 0, EXPERTS, ids)  # a column that is cut off
    best = logits.detach().unflatten(1, (heads, -1)).topk(TOPK // heads, dim=2).indices
    chosen = ids.unflatten(1, (heads, -1)).gather(2, best)[seen]
    shares = torch.bincount(chosen.flatten(), minlength=EXPERTS + 1)[:EXPERTS].double()
    scores = logits.double().unflatten(1, (heads, -1)).softmax(dim=2).flatten(1) / heads
    scores = scores.new_zeros(len(scores), EXPERTS + 1).scatter_add(1, ids, scores)[tokens, :EXPERTS]
    return EXPERTS * (shares / shares.sum() * scores.mean(dim=0)).sum()


def reference(monkeypatch, groups, layout, router_name, loss, per_token):
    """The loss to be logged, and the gradients by parameter."""
    router = make_router(groups, router_name, loss, per_token)
    calls, batches = whole_batch(monkeypatch, router, loss, layout)
    losses, counts, first, seen = [], [], 0, []
    if loss in BALANCING.values():
        logits = torch.cat([args[1] for args in calls])
        ids = None if calls[0][2] is None else torch.cat([args[2] for args in calls])
    for args, (_, mask) in zip(calls, batches, strict=True):
        for part in parts_of(loss, layout, mask):
            if loss == "z_loss":
                losses.append(args[0][part].double().logsumexp(dim=1).square().mean())
            elif loss == "vq_loss":
                tokens, codes = args[1][part].unsqueeze(1).double(), router.codes[args[2][part]].double()
                commitment = router.config.moe_vq_commitment * (codes.detach() - tokens).square().mean()
                losses.append((codes - tokens.detach()).square().mean() + commitment)
            else:
                part = part + first
                seen.append(part)
                counted = torch.cat(seen) if loss == "global_load_balancing_loss" else part
                losses.append(balance(router, logits, ids, part, counted))
            counts.append(len(part))
        first += mask.numel()
    losses, counts = torch.stack(losses), torch.tensor(counts)
    assert len(set(counts.tolist())) > 1
    mean = losses.mean()
    total = (losses * counts).sum() / counts.sum() if per_token else mean
    names, parameters = zip(*router.named_parameters(), strict=True)
    gradients = torch.autograd.grad(COEFF * total, parameters, allow_unused=True)
    return mean.detach(), dict(zip(names, gradients, strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("router", "loss", "per_token"), CASES)
def test_two_ranks_equal_one_rank_on_all_tokens(ranks, megatron_cpu, monkeypatch, layout, router, loss, per_token):
    value, expected = reference(monkeypatch, megatron_cpu, layout, router, loss, per_token)
    assert max(gradient.abs().max() for gradient in expected.values() if gradient is not None) > 1e-4
    for results in ranks:
        gradients, logs = results[layout, (router, loss, per_token)]
        torch.testing.assert_close(logs[loss].double(), value, **CLOSE)
        for name, gradient in expected.items():
            gradient = torch.zeros_like(gradients[name]) if gradient is None else gradient
            torch.testing.assert_close(gradients[name], gradient, **CLOSE, msg=partial("{}: {}".format, name))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("router", "loss", "per_token"), [case for case in CASES if case[0] == "topk"])
def test_without_padding_they_are_megatrons_but_for_the_global_loss_over_data_parallel_ranks(
    ranks, layout, router, loss, per_token
):
    """Megatron divides that one's gradient by the number of data-parallel ranks once more."""
    factor = 2 if layout == "DP2" and loss == "global_load_balancing_loss" else 1
    for results in ranks:
        (gradients, logs), (expected, expected_logs) = results[layout, "no padding", (router, loss, per_token)]
        assert logs.keys() == expected_logs.keys() == {loss}
        torch.testing.assert_close(logs[loss], expected_logs[loss], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(gradients["weight"], factor * expected["weight"], rtol=1e-4, atol=1e-6)
