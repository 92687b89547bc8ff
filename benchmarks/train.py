"""A training step of a small GPT with Megatron's optimizer: AIR-MoE on the compact path against TopKRouter."""

import functools
import logging

import torch

from benchmarks import checks, roofline
from benchmarks.arguments import positive
from benchmarks.measure import clock, world
from benchmarks.models import (
    Sizes,
    add_sizes,
    air_work,
    expert_work,
    make_config,
    rebuild_run,
    rebuild_work,
    topk_work,
    warm_up_codebook,
)
from benchmarks.timing import Case, time_interleaved

logger = logging.getLogger(__name__)

AIR, _TOPK = "GPT, AIRMoELayer", "GPT, MoELayer with TopKRouter"
_VOCABULARY = 256


def add_arguments(parser) -> None:
    add_sizes(parser, experts=16_384, hidden=256, tokens=2048, topk=32, ffn=2)
    parser.add_argument("--layers", type=positive, default=2, help="layers, each with a mixture of experts")
    parser.add_argument("--sequence", type=positive, default=256, help="tokens of a sequence")


def check_arguments(args) -> None:
    """Raise ValueError if the tokens are not those of whole sequences."""
    if args.tokens % args.sequence:
        raise ValueError(f"--tokens ({args.tokens}) must be divisible by --sequence ({args.sequence})")


def run(args) -> list[dict]:
    """Time forward, backward and the optimizer's step of both models on the same tokens.

    Both have our granular experts, because Megatron's would be a module per expert. The baseline uses Megatron's
    all-to-all dispatcher. AIR's optimizer phase includes the update of the codebooks. On a CPU its
    forward includes a step's share of the rebuild of the lists. On a GPU one step in twenty makes the whole rebuild,
    which the median leaves out. A whole rebuild has a row of its own.
    """
    with world() as (device, pg_collection):
        checks.check_router(pg_collection, device)
        _check(pg_collection, device)
        sizes = Sizes.of(args)
        batch = make_batch(sizes, args.sequence, device)
        shape = (args.layers, args.sequence)
        steps = {name: Trainer.of_router(name, sizes, *shape, pg_collection, device) for name in (AIR, _TOPK)}
        work, rebuilds, rebuild_works = {}, [], []
        for name, trainer in steps.items():
            layers = []
            for layer, hidden in trainer.layers_and_inputs(batch):
                if name == AIR:
                    warm_up_codebook(layer.router, hidden)
                    checks.check_lists(layer.router)
                    checks.check_at_size(layer.router, hidden.reshape(-1, 1, sizes.hidden))
                    routing = air_work(layer.router, hidden, sizes)
                    rebuilds.append(rebuild_run(layer.router))
                    rebuild_works.append(rebuild_work(layer.router, sizes))
                else:
                    routing = topk_work(sizes)
                layers += [routing, expert_work(sizes, trainer.num_used(layer, hidden))]
            shared = roofline.transformer(sizes.tokens, sizes.hidden, args.layers, args.sequence, _VOCABULARY)
            work[name] = roofline.together(*layers, shared, roofline.adam(trainer.num_parameters))
        cases = {
            name: Case(functools.partial(trainer.step, batch), work[name], sizes.tokens, name == _TOPK)
            for name, trainer in steps.items()
        }
        rebuild = "shortlist rebuild, all layers"
        cases[rebuild] = Case(
            lambda: {"total": sum(rebuild()["total"] for rebuild in rebuilds)}, roofline.together(*rebuild_works)
        )
        outcome = time_interleaved(cases, args, device, extra_phases=("optimizer",))
        columns = sizes.columns() | {"ffn": sizes.ffn, "layers": args.layers}
        rows = []
        for name in cases:
            times_faster = round(outcome.median(_TOPK) / outcome.median(name), 2) if name in steps else ""
            rows.append(outcome.row(name, columns, {"times_faster": times_faster}))
        return rows


class Trainer:
    """A GPT with Megatron's data-parallel wrapper and optimizer, in a world of one rank.

    Args:
        config: the model's config.
        spec: the spec of its layers.
        shape: number of token ids in the vocabulary, and of tokens in a sequence.
        optimizer: fields of Megatron's OptimizerConfig, beside those that all benchmarks set.
        seed: seed of the weights.
        more: further arguments of GPTModel.
    """

    def __init__(
        self,
        config,
        spec,
        shape: tuple[int, int],
        pg_collection,
        device: torch.device,
        optimizer: dict | None = None,
        seed: int = 0,
        **more,
    ) -> None:
        from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
        from megatron.core.models.gpt import GPTModel
        from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
        from megatron.core.transformer.module import Float16Module
        from megatron.core.transformer.moe.moe_logging import destroy_moe_metrics_tracker

        from air_moe_megatron.routers import find_routers

        destroy_moe_metrics_tracker()  # it has a slot for each layer of the previous model
        torch.manual_seed(seed)
        model = GPTModel(config, spec, *shape, pg_collection=pg_collection, **more).to(device)
        if config.bf16:
            model = Float16Module(config, model)
        ddp_config = DistributedDataParallelConfig(grad_reduce_in_fp32=True)
        self.model = DistributedDataParallel(config, ddp_config, model, pg_collection=pg_collection)
        self.model.train()
        fields = {"optimizer": "adam", "lr": 1e-4, "clip_grad": 1.0, **(optimizer or {})}
        optimizer_config = OptimizerConfig(bf16=config.bf16, params_dtype=config.params_dtype, **fields)
        self.optimizer = get_megatron_optimizer(optimizer_config, [self.model])
        self.routers = find_routers(self.model)
        self.device, self.num_parameters = device, sum(parameter.numel() for parameter in model.parameters())

    @classmethod
    def of_router(cls, name: str, sizes: Sizes, num_layers: int, sequence: int, pg_collection, device, **fields):
        """The model of this benchmark. ``name`` is AIR or the baseline; ``fields`` are further fields of the config."""
        is_air = name == AIR
        config = make_config(
            sizes,
            "air" if is_air else "topk",
            compact=is_air,
            num_layers=num_layers,
            hidden_dropout=0.0,
            attention_dropout=0.0,
            masked_softmax_fusion=False,
            bias_dropout_fusion=False,
            gradient_accumulation_fusion=False,
            **fields,
        )
        return cls(config, _layer_spec(config), (_VOCABULARY, sequence), pg_collection, device)

    def step(self, batch) -> dict[str, float]:
        """Make one training step like Megatron's training loop; returns its seconds and keeps the loss in ``loss``."""
        from air_moe_megatron.sync import discard_statistics, update_codebooks

        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        start = clock(self.device)
        discard_statistics(self.model)
        loss = self.model(batch["tokens"], batch["positions"], batch["mask"], labels=batch["labels"]).float().mean()
        forward = clock(self.device)
        loss.backward()
        self.model.finish_grad_sync()
        backward = clock(self.device)
        is_successful, _, _ = self.optimizer.step()
        if not is_successful:
            raise AssertionError("the optimizer skipped its step")
        if self.routers:
            update_codebooks(self.model)
        end = clock(self.device)
        self.loss = loss.detach()
        return {
            "forward": forward - start,
            "backward": backward - forward,
            "optimizer": end - backward,
            "total": end - start,
        }

    def layers_and_inputs(self, batch):
        """The MoE layers, each with its input [S, B, H]."""
        from megatron.core.transformer.moe.moe_layer import MoELayer

        seen, hooks = [], []
        for module in self.model.modules():
            if isinstance(module, MoELayer):
                keep = lambda module, inputs: seen.append((module, inputs[0].detach().clone()))  # noqa: E731
                hooks.append(module.register_forward_pre_hook(keep))
        with torch.no_grad():
            self.model(batch["tokens"], batch["positions"], batch["mask"], labels=batch["labels"])
        for hook in hooks:
            hook.remove()
        return seen

    @torch.no_grad()
    def num_used(self, layer, hidden) -> int:
        """Number of distinct experts that a layer selects."""
        if self.routers:
            return layer.router.route(hidden).topk_ids.unique().numel()
        return int(layer.router(hidden)[1].any(dim=0).sum())


def _layer_spec(config):
    """Megatron's own layer with granular experts, and with AIR routing if the config selects it."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules

    from air_moe_megatron.layer.experts import GranularExperts
    from air_moe_megatron.specs import with_air_layers

    spec = get_gpt_layer_local_spec(num_experts=config.num_moe_experts, moe_grouped_gemm=False)
    spec.submodules.mlp = functools.partial(MoELayer, submodules=MoESubmodules(experts=GranularExperts))
    return with_air_layers(spec, config)


def make_batch(sizes, sequence, device):
    generator = torch.Generator().manual_seed(0)
    shape = (sizes.tokens // sequence, sequence + 1)
    text = torch.randint(_VOCABULARY, shape, generator=generator).to(device)
    positions = torch.arange(sequence, device=device).expand(shape[0], sequence)
    mask = torch.ones(1, 1, sequence, sequence, dtype=torch.bool, device=device).triu(1)  # True: not attended to
    return {"tokens": text[:, :-1], "labels": text[:, 1:], "positions": positions, "mask": mask}


def _check(pg_collection, device):
    """Check that with full lists and equal weights both models have equal losses, also after optimizer steps.

    The input norm is off, because Megatron's router lacks it.
    """
    sizes = Sizes(experts=64, hidden=32, tokens=64, topk=4, ffn=2, clusters=4, shortlist=64)
    batch = make_batch(sizes, 16, device)
    fields = {"moe_router_input_norm": "none"}
    air, topk = (Trainer.of_router(name, sizes, 2, 16, pg_collection, device, **fields) for name in (AIR, _TOPK))
    missing, unexpected = air.model.module.load_state_dict(topk.model.module.state_dict(), strict=False)
    if unexpected or any(".router.codebook." not in name and ".router.index." not in name for name in missing):
        raise AssertionError(f"the models differ in {missing} and {unexpected}")
    for number in range(3):
        for trainer in (air, topk):
            trainer.step(batch)
        checks.same(f"loss of step {number}", air.loss, topk.loss)
    logger.info("check passed: with full lists a GPT with AIRMoELayer learns as one with TopKRouter")
