"""A training run: Megatron's `pretrain` with our flags, model configuration, checks and step boundary."""

import argparse
import contextlib
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NoReturn, TextIO

from megatron.core.enums import ModelType
from megatron.core.models.hybrid.hybrid_layer_allocation import Symbols
from megatron.core.package_info import __version__ as megatron_core_version
from megatron.core.transformer.spec_utils import import_module
from megatron.core.utils import get_te_version, get_torch_version
from megatron.training import inprocess_restart, pretrain, print_rank_0, set_startup_timestamps
from megatron.training.argument_utils import (
    gpt_config_from_args,
    hybrid_config_from_args,
    pretrain_cfg_container_from_args,
)
from megatron.training.arguments import parse_and_validate_args, parse_args
from megatron.training.config import PretrainConfigContainer
from megatron.training.models import GPTModelConfig, HybridModelConfig

from air_moe_megatron import console, preflight
from air_moe_megatron.agreement import Ranks, check_agreement, meet
from air_moe_megatron.arguments import add_air_arguments, transformer_config_from_args
from air_moe_megatron.batches import forward_step, get_embedding_ranks, train_valid_test_datasets_provider
from air_moe_megatron.checkpoints import check_checkpoint, fields_of_checkpoint
from air_moe_megatron.compat import release_process_groups, repair_help, require_supported_megatron
from air_moe_megatron.config import balancing_losses, is_plain_topk
from air_moe_megatron.memory import check_memory, num_moe_layers
from air_moe_megatron.routers import AIRRouter, find_routers
from air_moe_megatron.routers.hashing import hand_over_token_ids
from air_moe_megatron.specs import (
    air_hybrid_stack_spec,
    air_layer_spec,
    mtp_specs_with_air_layers,
    require_routers,
)
from air_moe_megatron.sync import codebook_updates


def extra_args_provider(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the flags that are ours to Megatron's parser.

    Args:
        parser: Megatron's parser, all of its own flags already added.
    Returns:
        The same parser.
    """
    group = parser.add_argument_group(title="air_moe_megatron")
    group.add_argument("--cpu", action="store_true", help="Train on CPU with the gloo backend; no GPU is needed.")
    group.add_argument(
        "--log-file",
        help="Append all output to this file; the screen gets losses, routing health, warnings and errors. "
        "Default: all output goes to the screen.",
    )
    parser.error = _refuse_command_line
    return repair_help(add_air_arguments(parser))


def _refuse_command_line(message: str) -> NoReturn:
    """In place of argparse's own, which has every rank print the usage of all of Megatron's flags."""
    raise ValueError(message)


def parse() -> tuple[argparse.Namespace, Ranks]:
    """Parse the command line; with `--use-checkpoint-args` our fields too are those of the checkpoint.

    A flag of ours that is given beside it keeps its value: the checks of the checkpoint say if that cannot be.

    Returns:
        Megatron's parsed and validated arguments, and the ranks of this start.
    Raises:
        ValueError: for a checkpoint whose arguments cannot be read.
    """
    ranks, fields = None, {}
    if "--use-checkpoint-args" in sys.argv:  # Megatron reads the checkpoint while it parses: check it before
        given = parse_args(extra_args_provider)
        ranks = meet(given)
        fields = fields_of_checkpoint(given, ranks)
        if ranks.rank == 0 and fields:
            listed = ", ".join(f"{name} {value}" for name, value in fields.items())
            print_rank_0(f"> --use-checkpoint-args: from the checkpoint {listed}")

    def provider(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        parser = extra_args_provider(parser)
        parser.set_defaults(**fields)
        return parser

    args = parse_and_validate_args(extra_args_provider=provider, args_defaults={"tokenizer_type": "GPT2BPETokenizer"})
    return args, ranks or meet(args)


def model_config_from_args(args: argparse.Namespace) -> GPTModelConfig | HybridModelConfig:
    """Build the model configuration: hybrid where `--hybrid-layer-pattern` is given, GPT otherwise.

    Args:
        args: Megatron's parsed and validated arguments.
    Returns:
        The configuration whose builder makes the model.
    Raises:
        ValueError: naming the field, value and rule that the arguments break.
    """
    transformer_config = transformer_config_from_args(args)
    if args.hybrid_layer_pattern is not None:
        config = hybrid_config_from_args(args, transformer_config)
    else:
        config = gpt_config_from_args(args, transformer_config)
    if is_plain_topk(args):
        return config
    # A spec may be given by --spec; None means Megatron's own choice.
    if args.hybrid_layer_pattern is not None:
        config.hybrid_stack_spec = air_hybrid_stack_spec(transformer_config, given=config.hybrid_stack_spec)
    else:
        config.transformer_layer_spec = partial(air_layer_spec, given=config.transformer_layer_spec)
    config.pre_wrap_hooks.append(require_routers)
    if args.moe_router_type == "hash":
        config.pre_wrap_hooks.append(hand_over_token_ids)
    return config


def leave_out_codebooks(model: list) -> list:
    """Have the routers of a model not ask the checkpoint, which holds none, for codebooks.

    Args:
        model: Megatron's list of model chunks.
    Returns:
        The same list, as Megatron's hooks must.
    """
    for router in find_routers(model, AIRRouter):
        router.is_codebook_left_out = True
    return model


def refuse_unsupported(args: argparse.Namespace) -> None:
    """Refuse flags that this entry would otherwise accept and not honour.

    Args:
        args: Megatron's parsed and validated arguments.
    Raises:
        ValueError: naming the flag and why it cannot be honoured.
    """
    if args.freeze_all_layers:
        raise ValueError(
            "--freeze-all-layers is not supported: Megatron freezes only models that it builds from arguments"
        )
    if args.logits_load_dir is not None:
        raise ValueError(
            f"--logits-load-dir ({args.logits_load_dir}) is not supported: "
            "this entry has no knowledge distillation from cached logits"
        )
    cause = "--moe-granular-experts" if args.moe_router_type == "topk" else f"--moe-router-type {args.moe_router_type}"
    if not is_plain_topk(args) and args.moe_routing_trace_capture_logits:
        raise ValueError(
            f"--moe-routing-trace-capture-logits is not supported with {cause}: "
            "it records exact logits of all experts inside Megatron's own router"
        )
    for name in ("use_megatron_fsdp", "use_torch_fsdp2"):
        if not is_plain_topk(args) and getattr(args, name):
            raise ValueError(
                f"--{name.replace('_', '-')} is not supported with {cause}: "
                "codebooks, health lines and main_grad read whole parameters outside of the forward"
            )
    packed = "--sft" if args.sft else "--dataloader-inter-document-masking"
    if args.moe_router_type == "hash" and (args.sft or args.dataloader_inter_document_masking):
        if args.micro_batch_size is not None and args.micro_batch_size > 1:
            raise ValueError(
                f"--micro-batch-size ({args.micro_batch_size}) must be 1 with --moe-router-type hash and {packed}: the "
                "tokens reach the layer in another order than their ids the embedding"
            )
    balancing = [] if is_plain_topk(args) else balancing_losses(args)
    if "seq_aux_loss" in balancing and (args.sft or args.dataloader_inter_document_masking):
        raise ValueError(
            f"--moe-router-load-balancing-type seq_aux_loss is not supported with {cause} and {packed}: a router is "
            "not told where documents end, and would balance a pack of them as one sequence; use aux_loss or "
            "global_aux_loss"
        )
    if balancing and args.hybrid_context_parallel:
        raise ValueError(
            f"--moe-router-load-balancing-type {' '.join(balancing)} is not supported with {cause} and "
            "--hybrid-context-parallel: the ranks that hold parts of a sequence change with every microbatch; set "
            "--moe-aux-loss-coeff 0"
        )
    if args.moe_granular_experts and args.save_tokens_per_expert_interval is not None:
        raise ValueError(
            f"--save-tokens-per-expert-interval ({args.save_tokens_per_expert_interval}) is not supported with "
            "--moe-granular-experts: it records what Megatron's own experts are given"
        )
    if args.moe_granular_experts and args.moe_use_upcycling:
        raise ValueError(
            "--moe-use-upcycling is not supported with --moe-granular-experts: an expert of a few rows is no copy of a "
            "dense MLP"
        )
    if args.perform_rl_step:
        raise ValueError("--perform-rl-step is not supported: this entry only pretrains; Megatron-LM has train_rl.py")
    if args.spec is not None and import_module(args.spec) is None:
        raise ValueError(f"--spec {' '.join(args.spec)} cannot be imported, and Megatron would use its default spec")
    if args.fim_data and args.hybrid_layer_pattern is not None:
        raise ValueError(
            f"--fim-data is not supported with --hybrid-layer-pattern ({args.hybrid_layer_pattern}): "
            "this entry makes such data for GPT models only"
        )
    if args.overlap_moe_expert_parallel_comm and (args.sft or args.dataloader_inter_document_masking):
        raise ValueError(
            f"--overlap-moe-expert-parallel-comm is not supported with {packed}: "
            "its schedule plan drops the document boundaries"
        )


def refuse_bad_values(args: argparse.Namespace) -> None:
    """Refuse values of Megatron's flags that end a run in an error which does not name them.

    Args:
        args: Megatron's parsed and validated arguments.
    Raises:
        ValueError: naming the flag, its value and the rule.
    """
    for name in ("log_interval", "tensorboard_log_interval", "eval_interval", "log_memory_interval"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} ({value}) must be at least 1")
    counts_evaluations = bool(args.train_iters or args.train_samples) and not (args.full_validation or args.skip_train)
    if counts_evaluations and args.eval_interval is None:
        raise ValueError("--eval-interval (None) must be given: Megatron counts evaluations with it, also with 0 steps")
    if args.full_validation and not args.multiple_validation_sets:
        raise ValueError(
            "--full-validation needs --multiple-validation-sets, with one set too: Megatron-Core 0.19 reads its number "
            "of steps as a list"
        )
    if not is_plain_topk(args) and args.hybrid_layer_pattern is not None and num_moe_layers(args) == 0:
        raise ValueError(
            f"--hybrid-layer-pattern ({args.hybrid_layer_pattern}) must have a layer {Symbols.MOE}: without an MoE "
            f"layer --moe-router-type {args.moe_router_type} has no effect"
        )


def run(
    config: PretrainConfigContainer, pretrain_func: Callable, store: Any, adapted: bool, screen: TextIO | None = None
) -> None:
    """Hand over to Megatron's training loop.

    Args:
        config: everything Megatron configures, the model included.
        pretrain_func: `megatron.training.pretrain`, wrapped where in-process restart is on.
        store: the `torch.distributed` store of in-process restart, or None.
        adapted: whether a layer is ours; otherwise Megatron runs without any of our adaptations of it.
        screen: where losses go too when standard output is a file, or None.
    """
    with contextlib.ExitStack() as adaptations:
        if screen is not None:
            adaptations.enter_context(console.losses_on(screen))
        if adapted:
            adaptations.enter_context(mtp_specs_with_air_layers())
            adaptations.enter_context(codebook_updates())
        pretrain_func(
            config,
            train_valid_test_datasets_provider,
            ModelType.encoder_or_decoder,
            forward_step,
            store=store,
            get_embedding_ranks=get_embedding_ranks if isinstance(config.model, GPTModelConfig) else None,
        )


def train(program_start: float | None = None, screen: TextIO | None = None) -> None:
    """Parse the command line, check it, and train.

    Args:
        program_start: when the program began, in seconds since the epoch, for Megatron's report of start-up times.
        screen: where losses go too when standard output is a file, or None.
    Raises:
        SystemExit: for a combination of flags, data or a checkpoint that cannot work; one line says why.
        ImportError: for a Megatron that this package is not tested with.
    """
    main_start = time.time()
    require_supported_megatron()
    print_rank_0(f"> PyTorch version ................ {get_torch_version()}")
    print_rank_0(f"> Megatron-Core version .......... {megatron_core_version}")
    print_rank_0(f"> Transformer Engine version ..... {get_te_version()}")
    set_startup_timestamps(program_start=program_start, main_entry=main_start)
    with console.refusals():
        args, ranks = parse()
        check_agreement(args, ranks)
        refuse_unsupported(args)
        refuse_bad_values(args)
        ranks.check("data", lambda: preflight.check_data(args))
        model_config = model_config_from_args(args)
        ranks.check("memory", lambda: check_memory(args))
        if check_checkpoint(args, model_config.transformer, ranks):
            model_config.pre_wrap_hooks.append(leave_out_codebooks)
    pretrain_func, store = inprocess_restart.maybe_wrap_for_inprocess_restart(pretrain)
    run(pretrain_cfg_container_from_args(args, model_config), pretrain_func, store, not is_plain_topk(args), screen)
    release_process_groups()
