"""Build the model of a checkpoint and load it, without the flags that it was trained with.

Megatron's ``--use-checkpoint-args`` takes only a part of what shapes a model: not the dtype of the router, the epsilon
of the norms, the scaling of rotary embeddings or any field of ours. Here the checkpoint gives the defaults of all
arguments that the model's configuration is made from. A flag on the command line overrides them and is reported.
Arguments of a run rather than its model are not taken: parallelism, recomputation, data, and randomness of forwards.
"""

import argparse
import contextlib
import copy
import dataclasses
import sys
from collections.abc import Callable, Collection
from functools import partial
from typing import Any

import torch
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.heterogeneous.heterogeneous_config import HeterogeneousTransformerConfig
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig
from megatron.training.checkpointing import load_checkpoint
from megatron.training.config.training_config import TokenizerConfig
from megatron.training.global_vars import rebuild_tokenizer, set_global_variables
from megatron.training.initialize import initialize_megatron
from megatron.training.models import GPTModelConfig, HybridModelConfig

from air_moe_megatron.command.agreement import Ranks, check_agreement, meet
from air_moe_megatron.command.arguments import (
    NOT_GIVEN,
    complete,
    megatrons_errors,
    parse_flags,
    without_fields_of_others,
)
from air_moe_megatron.command.checkpoints import check_checkpoint, saved_arguments
from air_moe_megatron.command.entry_refusals import refused_flags
from air_moe_megatron.command.memory import check_memory
from air_moe_megatron.command.model import get_embedding_ranks, model_config_from_args, skip_missing_state
from air_moe_megatron.config import LAYOUT_FIELDS, AIRMoEConfig, is_plain_topk, raise_first, resolve_sizes
from air_moe_megatron.inference.text import check_tokenizer_files
from air_moe_megatron.routers.missing_state import MissingState
from air_moe_megatron.specs import mtp_specs_with_air_layers

_CONFIGS = (AIRMoEConfig, MLATransformerConfig, HeterogeneousTransformerConfig)

RUN_ARGUMENTS = frozenset(
    {
        *(field.name for field in dataclasses.fields(ModelParallelConfig)),
        # stages of a pipeline
        *("num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage", "pipeline_model_parallel_layout"),
        *("account_for_embedding_in_pipeline_split", "account_for_loss_in_pipeline_split"),
        # memory of training, and CUDA graphs
        *("recompute_granularity", "recompute_method", "recompute_num_layers", "recompute_modules"),
        *("moe_layer_recompute", "distribute_saved_activations", "init_model_with_meta_device"),
        *("fine_grained_activation_offloading", "offload_modules", "min_offloaded_tensor_size"),
        *("delay_offload_until_cuda_graph", "delta_offload_bytes_across_pp_ranks", "activation_offload_fraction"),
        *("fine_grained_offloading_max_inflight_offloads", "moe_paged_stash", "moe_paged_stash_page_size"),
        *("moe_paged_stash_buffer_size_factor_cuda", "moe_paged_stash_buffer_size_factor_cpu"),
        *("enable_cuda_graph", "cuda_graph_use_single_mempool", "cuda_graph_retain_backward_graph"),
        *("cuda_graph_warmup_steps", "external_cuda_graph", "cuda_graph_impl", "cuda_graph_modules"),
        *("inference_cuda_graph_scope", "cuda_graph_scope", "use_inference_optimized_layers", "inference_rng_tracker"),
        # random or replayed routing
        *("moe_input_jitter_eps", "moe_router_force_load_balancing", "moe_router_force_biased"),
        *("moe_enable_routing_replay", "test_mode", "config_logger_dir"),
        *LAYOUT_FIELDS,
    }
)
"""Arguments of a run, not of its model, among the fields of Megatron's config and ours. They keep their defaults."""

MODEL_ARGUMENTS = frozenset(
    {
        *("num_experts", "swiglu", "squared_relu", "quick_geglu", "group_query_attention"),
        *("init_method_xavier_uniform", "bf16", "fp16", "fp16_lm_cross_entropy", "spec", "hybrid_layer_pattern"),
        *("no_persist_layer_norm", "bias_swiglu_fusion", "bias_gelu_fusion"),
        *("seq_length", "max_position_embeddings", "position_embedding_type", "add_position_embedding"),
        *("use_rotary_position_embeddings", "rotary_base", "rotary_percent", "rotary_seq_len_interpolation_factor"),
        *("use_rope_scaling", "rope_scaling_factor", "untie_embeddings_and_output_weights"),
        *("make_vocab_size_divisible_by", "fp8_param_gather", "fp4_param_gather"),
        *("te_precision_config_file", "kitchen_config_file", "kitchen_recipe_number"),
        # context of a token
        *("reset_position_ids", "reset_attention_mask", "create_attention_mask_in_dataloader"),
        *("sft", "dataloader_inter_document_masking"),
        *("ckpt_format",),
    }
)
"""Arguments that shape a model, beside the fields of its config and tokenizer."""

_NEVER_TRAINS = {
    "skip_train": True,
    "no_load_optim": True,
    "no_load_rng": True,
    "exit_on_missing_checkpoint": True,
    "rerun_mode": "disabled",
    "eval_iters": 0,
    "gradient_accumulation_fusion": False,  # Megatron needs Apex if it is on
}


def model_arguments(saved: argparse.Namespace) -> dict[str, Any]:
    """The arguments of a checkpoint that its model and its tokenizer are made from.

    Args:
        saved: the validated arguments of the run that saved the checkpoint.
    """
    names = {field.name for config in _CONFIGS for field in dataclasses.fields(config)} - RUN_ARGUMENTS
    names |= {field.name for field in dataclasses.fields(TokenizerConfig)} | MODEL_ARGUMENTS
    values = {name: value for name, value in vars(saved).items() if name in names}
    if values.get("hybrid_layer_pattern") is not None:
        values.pop("num_layers", None)  # Megatron derives it, and refuses both
    return values


@dataclasses.dataclass(frozen=True)
class CommandLine:
    """The command line, the arguments of the checkpoint that it names, and the ranks."""

    add_flags: Callable[[argparse.ArgumentParser], object]
    given: argparse.Namespace
    """The command line alone, parsed with the defaults :data:`NOT_GIVEN`."""
    saved: argparse.Namespace
    """All arguments that the checkpoint was saved with."""
    ranks: Ranks


def read_command_line(add_flags: Callable[[argparse.ArgumentParser], object], saves: bool = False) -> CommandLine:
    """Read the command line and the arguments of the checkpoint that it names.

    Communicates with the other ranks through the store of the rendezvous.

    Args:
        add_flags: adds the flags of the command to Megatron's parser.
        saves: whether the command saves a model; otherwise ``--save`` is refused.
    Raises:
        ValueError: if there is no checkpoint, or it does not hold its arguments.
    """
    given = parse_flags(NOT_GIVEN, add_flags)
    if given.load is None:
        raise ValueError("--load must name the folder of a checkpoint")
    if given.save is not None and not saves:
        raise ValueError(f"--save ({given.save}) must be left out: nothing is trained")
    ranks = meet(given)
    return CommandLine(add_flags, given, saved_arguments(given, ranks), ranks)


def complete_arguments(command: CommandLine, ignored: Collection[str] = ()) -> argparse.Namespace:
    """Parse the command line, with the arguments of the checkpoint as defaults.

    Communicates with the other ranks through the store of the rendezvous.

    Args:
        command: as :func:`read_command_line` returns it.
        ignored: arguments of the checkpoint that the command ignores and reports.
    Returns:
        Megatron's parsed and validated arguments. Of Megatron's global variables only the tokenizer is set.
    Raises:
        ValueError: if flags do not fit the checkpoint.
    """
    given, saved = command.given, command.saved
    values = without_fields_of_others(model_arguments(saved), given)
    _check_padding(values, given.tensor_model_parallel_size)
    check_tokenizer_files(values, given)
    kept = {name: value for name, value in values.items() if name not in ignored}
    defaults = {"micro_batch_size": saved.micro_batch_size} | kept | _NEVER_TRAINS
    if given.save is not None:
        defaults["save_interval"] = 1  # Megatron requires one
    args = parse_flags(defaults, command.add_flags)
    complete(args, rebuild_tokenizer)
    check_agreement(args, command.ranks)
    raise_first(refused_flags(args))
    # Flags of Megatron's own evaluation, which our forwards without gradients would follow.
    args.eval_micro_batch_size, args.full_validation = args.micro_batch_size, False
    if command.ranks.rank == 0:
        _report_changes(args, values)
    return args


def build_and_load(
    args: argparse.Namespace, ranks: Ranks, remakes_lists_of: argparse.Namespace | None = None, saves: bool = False
) -> list[torch.nn.Module]:
    """Make the process groups, build the model, and load the checkpoint into it.

    Communicates. The caller destroys the process groups, as ``process_groups.process_groups_released`` does.

    Args:
        args: as :func:`complete_arguments` returns them; their ``iteration`` becomes that of the checkpoint.
        ranks: as :func:`read_command_line` returns them.
        remakes_lists_of: the checkpoint's arguments, for a caller that makes what AIR routers lack. A missing codebook
            then stays random, and lists of another length or number of parts are not loaded. None refuses both.
        saves: whether the caller will save the model, so that the folder of ``--save`` must be fit for it.
    Returns:
        Megatron's list of model chunks, in evaluation mode.
    Raises:
        ValueError: if the checkpoint is damaged or does not fit.
    """
    config = model_config_from_args(args)
    ranks.check("memory", lambda: check_memory(args))
    as_checked = argparse.Namespace(**{**vars(args), "skip_train": not saves})  # Megatron saves only if it trains
    as_saved = _with_lists_as_saved(config.transformer, remakes_lists_of)
    missing = check_checkpoint(as_checked, as_saved, ranks)
    if as_saved is not config.transformer and list_form(as_saved) != list_form(config.transformer):
        missing = MissingState.LISTS
    if remakes_lists_of is None and missing is MissingState.CODEBOOK:
        raise ValueError(
            f"--load '{args.load}' was trained with top-k routing, so --moe-router-type (air) must be left out: the "
            "codebooks would be random"
        )
    if missing:
        config.pre_wrap_hooks.append(partial(skip_missing_state, missing))
    model = _build(config, args)
    args.iteration, args.num_floating_point_operations_so_far = load_checkpoint(model, None, None)
    for chunk in model:
        chunk.eval()
    return model


def _with_lists_as_saved(config: TransformerConfig, saved: argparse.Namespace | None) -> TransformerConfig:
    """The config with the list sizes of a checkpoint, where both are of AIR with lists by tokens; otherwise itself."""
    is_air = getattr(config, "moe_router_type", "topk") == getattr(saved, "moe_router_type", "topk") == "air"
    if not is_air or config.moe_air_codebook_source != "tokens":
        return config
    config = copy.copy(config)
    config.moe_air_list_parts = getattr(saved, "moe_air_list_parts", 1)
    for name in ("moe_air_shortlist_size", "moe_air_num_probes", "moe_router_topk"):  # two decide on automatic sizes
        setattr(config, name, getattr(saved, name, getattr(config, name)))
    config.moe_air_shard_experts = False
    return config


def _build(config: GPTModelConfig | HybridModelConfig, args: argparse.Namespace) -> list[torch.nn.Module]:
    """Initialize Megatron and build the model chunks of this rank."""
    with megatrons_errors():
        set_global_variables(args, build_tokenizer=False)
    initialize_megatron(
        allow_no_cuda=args.cpu,
        get_embedding_ranks=get_embedding_ranks if isinstance(config, GPTModelConfig) else None,
    )
    with contextlib.nullcontext() if is_plain_topk(args) else mtp_specs_with_air_layers():
        return config.get_builder_cls()(config).build_distributed_models(
            ProcessGroupCollection.use_mpu_process_groups(), wrap_with_ddp=False, data_parallel_random_init=False
        )


def list_form(config: TransformerConfig) -> tuple[int, int]:
    """Length and number of parts of the lists in an AIR config."""
    return resolve_sizes(config).shortlist_size, config.moe_air_list_parts


def _check_padding(values: dict[str, Any], tensor_parallel_size: int) -> None:
    """Refuse another padding of the vocabulary: it adds logits that were never trained and so changes every loss."""
    padded = values.get("padded_vocab_size")
    if padded is not None and padded % tensor_parallel_size:
        raise ValueError(
            f"--tensor-model-parallel-size ({tensor_parallel_size}) must divide the padded vocabulary size of the "
            f"checkpoint ({padded})"
        )


def _report_changes(args: argparse.Namespace, values: dict[str, Any]) -> None:
    """Report on standard error which arguments of the model differ from those of the checkpoint."""
    changed = [
        f"{name} is {getattr(args, name)} (was {value})"
        for name, value in values.items()
        if getattr(args, name, value) != value
    ]
    if changed:
        sys.stderr.write(f"not as in the checkpoint: {', '.join(changed)}\n")
