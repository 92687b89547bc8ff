"""Flags that ``air_moe_megatron.pretrain`` refuses, in two tables; docs/limits.md is generated from the first.

Refusals that follow from a config alone are in ``config/refusals.py``.
"""

import argparse
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

from megatron.core.models.hybrid.hybrid_layer_allocation import Symbols
from megatron.core.transformer.spec_utils import import_module

from air_moe_megatron.command.arguments import NO_YAML, has_experts_by_layer, is_packed, value_of
from air_moe_megatron.config import (
    Problems,
    balancing_losses,
    is_plain_topk,
    num_hash_layers,
    uses_hash,
)


@dataclass(frozen=True)
class FlagRefusal:
    """A flag that this entry would accept but not honor. It is refused if it is given and the cause applies."""

    flag: str
    reason: str
    cause: str = ""
    """Name in errors and docs/limits.md; empty if the flag is always refused. {router} stands for the flag that selects
    a layer of ours, {packed} for the flag that packs documents, {hash} for the one that selects a hash router."""
    applies: Callable[[argparse.Namespace], bool] = lambda args: True
    """Whether the cause applies to the arguments."""


@dataclass(frozen=True)
class FlagRule:
    """A rule for the value of a flag. A value that breaks it would end the run later in an unclear error."""

    flag: str
    when: Callable[[argparse.Namespace], bool]
    rule: str
    """Text of the error after the flag and its value; {router} as in :class:`FlagRefusal`, {args} for the arguments."""


def refused_flags(args: argparse.Namespace) -> Problems[None]:
    """Yield a ValueError for each row of both tables that applies, with the flag, its value and the reason or rule.

    A start would otherwise accept these flags and not honor them, or end later in an unclear error.
    """
    for row in FLAG_REFUSALS:
        value = value_of(args, row.flag)
        if value is not None and value is not False and row.applies(args):
            cause = row.cause.format(router=_router_flag(args), packed=_packing_flag(args), hash=_hash_flag(args))
            cause = f" with {cause}" if cause else ""
            yield ValueError(f"{_shown(args, row.flag)} is not supported{cause}: {row.reason}")
    for row in FLAG_RULES:
        if row.when(args):
            yield ValueError(f"{_shown(args, row.flag)} {row.rule.format(router=_router_flag(args), args=args)}")


def _router_flag(args: argparse.Namespace) -> str:
    if args.moe_router_type != "topk":
        return f"--moe-router-type {args.moe_router_type}"
    return "--moe-granular-experts" if args.moe_granular_experts else "--moe-num-hash-layers"


def _hash_flag(args: argparse.Namespace) -> str:
    return "--moe-router-type hash" if args.moe_router_type == "hash" else "--moe-num-hash-layers"


def _packing_flag(args: argparse.Namespace) -> str:
    return "--sft" if args.sft else "--dataloader-inter-document-masking"


def _shown(args: argparse.Namespace, flag: str) -> str:
    """The flag, with its value if it takes one."""
    value = value_of(args, flag)
    if value is True:
        return flag
    return f"{flag} ({' '.join(map(str, value)) if isinstance(value, list) else value})"


def _has_our_layers(args: argparse.Namespace) -> bool:
    return not is_plain_topk(args)


def _below_one(flag: str) -> Callable[[argparse.Namespace], bool]:
    return lambda args: value_of(args, flag) is not None and value_of(args, flag) < 1


def _is_importable(spec: list[str]) -> bool:
    """Whether Megatron finds a spec. It would take its default instead of a module that it does not find."""
    try:
        return import_module(spec) is not None
    except (KeyError, ValueError):  # no such name in the module, or not two words
        return False


def _ranks_of_experts(args: argparse.Namespace) -> int:
    """The number of ranks that hold all experts of all layers once."""
    tensor_parallel = args.expert_tensor_parallel_size or args.tensor_model_parallel_size
    return args.expert_model_parallel_size * tensor_parallel * args.pipeline_model_parallel_size


def _decreases_batch(args: argparse.Namespace) -> bool:
    """Whether Megatron would round the global batch down to whole microbatches on all data-parallel ranks."""
    ranks_of_model = args.tensor_model_parallel_size * args.pipeline_model_parallel_size * args.context_parallel_size
    if args.skip_train or args.global_batch_size is None or args.micro_batch_size is None:
        return False
    smallest = args.micro_batch_size * max(1, args.world_size // ranks_of_model)  # too few ranks are refused elsewhere
    return args.global_batch_size % smallest != 0


def _counts_evaluations(args: argparse.Namespace) -> bool:
    return bool(args.train_iters or args.train_samples) and not (args.full_validation or args.skip_train)


def _is_emerging(args: argparse.Namespace) -> bool:
    """Whether the optimizer is one of the package emerging_optimizers, as Muon is."""
    return args.optimizer not in ("adam", "sgd")


def _is_emerging_and_distributed(args: argparse.Namespace) -> bool:
    """Before or after Megatron has completed the arguments: it then moves the flag to a field of its own."""
    is_asked_for = args.use_distributed_optimizer or args.optimizer == "dist_muon"
    return _is_emerging(args) and (is_asked_for or getattr(args, "use_layer_wise_distributed_optimizer", False))


def _hashes_hybrid(args: argparse.Namespace) -> bool:
    return args.hybrid_layer_pattern is not None and num_hash_layers(args) > 0


_WHOLE_PARAMETERS = "codebooks, health lines and main_grad read whole parameters outside of the forward"

FLAG_REFUSALS: tuple[FlagRefusal, ...] = (
    FlagRefusal("--freeze-all-layers", "Megatron freezes only models that it builds from arguments"),
    FlagRefusal("--logits-load-dir", "this entry has no knowledge distillation from cached logits"),
    FlagRefusal(
        "--moe-routing-trace-capture-logits", "it records exact logits of all experts inside Megatron's own router",
        "{router}", _has_our_layers,
    ),
    FlagRefusal("--use-megatron-fsdp", _WHOLE_PARAMETERS, "{router}", _has_our_layers),
    FlagRefusal("--use-torch-fsdp2", _WHOLE_PARAMETERS, "{router}", _has_our_layers),
    FlagRefusal(
        "--micro-batch-size",
        "packed microbatches are flattened after the embedding has seen the ids, so ids and hidden states are in "
        "different orders; use --micro-batch-size 1",
        "{hash} and {packed}",
        lambda args: uses_hash(args) and is_packed(args) and args.micro_batch_size > 1,
    ),
    FlagRefusal(
        "--moe-router-load-balancing-type",
        "a router is not told where documents end, and would balance a pack of them as one sequence; use aux_loss or "
        "global_aux_loss",
        "{router} and {packed}",
        lambda args: _has_our_layers(args) and is_packed(args) and "seq_aux_loss" in balancing_losses(args),
    ),
    FlagRefusal(
        "--moe-router-load-balancing-type",
        "the ranks that hold parts of a sequence change with every microbatch; set --moe-aux-loss-coeff 0",
        "{router} and --hybrid-context-parallel",
        lambda args: _has_our_layers(args) and args.hybrid_context_parallel and bool(balancing_losses(args)),
    ),
    FlagRefusal(
        "--hybrid-context-parallel",
        "batch norm sums over the ranks in every forward, and their numbers of forwards differ; use "
        "--moe-product-key-query-norm layernorm",
        "--moe-router-type product_key",
        lambda args: (
            args.moe_router_type == "product_key" and args.moe_product_key_query_norm in ("auto", "batchnorm")
        ),
    ),
    FlagRefusal(
        "--save-tokens-per-expert-interval", "it records what Megatron's own experts are given",
        "--moe-granular-experts", lambda args: args.moe_granular_experts,
    ),
    FlagRefusal(
        "--moe-use-upcycling", "an expert of a few hidden units is no copy of a dense MLP",
        "--moe-granular-experts", lambda args: args.moe_granular_experts,
    ),
    FlagRefusal("--perform-rl-step", "this entry only pretrains; Megatron-LM has train_rl.py"),
    FlagRefusal(
        "--fim-data", "this entry makes such data for GPT models only",
        "--hybrid-layer-pattern", lambda args: args.hybrid_layer_pattern is not None,
    ),
    FlagRefusal(
        "--overlap-moe-expert-parallel-comm", "its schedule plan drops the document boundaries", "{packed}", is_packed
    ),
    FlagRefusal(
        "--rampup-batch-size", "Megatron-Core 0.19 ignores it; use --step-batch-size-schedule with --train-samples"
    ),
    FlagRefusal(
        "--step-batch-size-schedule",
        "Megatron would count the learning rate's steps in batches of one microbatch per data-parallel rank; use "
        "--train-samples, --lr-decay-samples and --lr-warmup-samples",
        "--train-iters", lambda args: args.train_iters is not None and not args.skip_train,
    ),
    FlagRefusal(
        "--decrease-batch-size-if-needed",
        "Megatron would count the learning rate's steps and the length of the run in the larger batches; give the "
        "--global-batch-size that runs",
        "a --global-batch-size that microbatches do not divide", _decreases_batch,
    ),
    FlagRefusal("--yaml-cfg", NO_YAML),  # refused before it is parsed; here for docs/limits.md
)  # fmt: skip
"""Checked in this order. A start raises the error of the first row that applies."""

FLAG_RULES: tuple[FlagRule, ...] = (
    FlagRule(
        "--spec",
        lambda args: args.spec is not None and not _is_importable(args.spec),
        "cannot be imported: it takes a module and a name in it",
    ),
    *(
        FlagRule(flag, _below_one(flag), "must be at least 1")
        for flag in ("--seed", "--log-interval", "--tensorboard-log-interval", "--eval-interval")
        + ("--log-memory-interval",)
    ),
    FlagRule(
        "--expert-model-parallel-size",
        lambda args: args.world_size % _ranks_of_experts(args),
        "times --expert-tensor-parallel-size ({args.expert_tensor_parallel_size}) and --pipeline-model-parallel-size "
        "({args.pipeline_model_parallel_size}) must divide the number of ranks ({args.world_size})",
    ),
    FlagRule(
        "--tensor-model-parallel-size",
        lambda args: (
            args.tensor_model_parallel_size > 1
            and args.num_experts is not None
            and not (args.sequence_parallel or args.skip_train)
        ),
        "needs --sequence-parallel: Megatron trains no MoE layer without it",
    ),
    FlagRule(
        "--context-parallel-size",
        lambda args: args.context_parallel_size > 1 and args.transformer_impl == "local",
        "needs --transformer-impl transformer_engine, and so a GPU: no other attention of Megatron supports it",
    ),
    FlagRule(
        "--eval-interval",
        lambda args: _counts_evaluations(args) and args.eval_interval is None,
        "must be given: Megatron counts evaluations with it, also with 0 steps",
    ),
    FlagRule(
        "--full-validation",
        lambda args: args.full_validation and not args.multiple_validation_sets,
        "needs --multiple-validation-sets, with one set too: Megatron-Core 0.19 reads its number of steps as a list",
    ),
    FlagRule(
        "--full-validation",
        lambda args: (
            args.full_validation
            and args.pipeline_model_parallel_size > 1
            and (args.eval_micro_batch_size or args.micro_batch_size) != 1
        ),
        "needs --eval-micro-batch-size 1 with pipeline stages: it takes sequences one by one, and the stages would "
        "wait for more",
    ),
    FlagRule(
        "--multiple-validation-sets",
        lambda args: args.multiple_validation_sets and not args.full_validation,
        "needs --full-validation: Megatron-Core 0.19 takes no samples of several sets",
    ),
    FlagRule(
        "--optimizer",
        lambda args: _is_emerging(args) and importlib.util.find_spec("emerging_optimizers") is None,
        "needs the package emerging-optimizers, which is not installed",
    ),
    FlagRule(
        "--optimizer",
        lambda args: _is_emerging(args) and args.fp16,
        "excludes --fp16: Megatron scales no loss for it",
    ),
    FlagRule(
        "--optimizer",
        lambda args: _is_emerging_and_distributed(args) and not args.bf16,
        "needs --bf16 if it is distributed: in fp32 Megatron-Core 0.19 ends at the first loss",
    ),
    FlagRule(
        "--optimizer",
        lambda args: _is_emerging_and_distributed(args) and args.cpu,
        "cannot be distributed with --cpu: it gathers tensors of different sizes, and gloo gathers equal ones only",
    ),
    FlagRule(
        "--wandb-project",
        lambda args: args.wandb_project and importlib.util.find_spec("wandb") is None,
        "needs the package wandb, which is not installed",
    ),
    FlagRule(
        "--wandb-project",
        lambda args: args.wandb_project and not args.wandb_exp_name,
        "needs --wandb-exp-name, the name of the run",
    ),
    FlagRule(
        "--wandb-project",
        lambda args: args.wandb_project and not (args.wandb_save_dir or args.save),
        "needs --wandb-save-dir or --save, the folder of its files",
    ),
    FlagRule(
        "--hybrid-layer-pattern",
        lambda args: (
            _has_our_layers(args) and args.hybrid_layer_pattern is not None and not any(has_experts_by_layer(args))
        ),
        f"must have a layer {Symbols.MOE}: without an MoE layer {{router}} has no effect",
    ),
    FlagRule(
        "--moe-num-hash-layers",
        lambda args: _hashes_hybrid(args) and num_hash_layers(args) >= sum(has_experts_by_layer(args)) > 0,
        f"must be below the number of layers {Symbols.MOE} in --hybrid-layer-pattern; for all of them there is "
        "--moe-router-type hash",
    ),
    FlagRule(
        "--moe-num-hash-layers",
        lambda args: _hashes_hybrid(args) and args.pipeline_model_parallel_size > 1,
        "needs --pipeline-model-parallel-size 1 with --hybrid-layer-pattern: the stages of such a pattern are not "
        "looked through for hash layers",
    ),
)
"""Checked after FLAG_REFUSALS, in this order."""
