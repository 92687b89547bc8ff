"""The configuration of the model that a command trains or loads, and the ranks that hold its embeddings."""

import argparse
from functools import partial

import torch
from megatron.core.transformer.multi_token_prediction import get_mtp_ranks
from megatron.training import get_args
from megatron.training.argument_utils import (
    core_transformer_config_from_args,
    gpt_config_from_args,
    hybrid_config_from_args,
)
from megatron.training.models import GPTModelConfig, HybridModelConfig

from air_moe_megatron.command.arguments import has_experts_by_layer, transformer_config_from_args
from air_moe_megatron.config import is_plain_topk, uses_hash
from air_moe_megatron.routers import AIRRouter, find_routers
from air_moe_megatron.routers.hashing import hand_over_token_ids
from air_moe_megatron.routers.missing_state import MissingState
from air_moe_megatron.specs import air_hybrid_stack_spec, air_layer_spec, require_routers


def model_config_from_args(args: argparse.Namespace) -> GPTModelConfig | HybridModelConfig:
    """Build the configuration of the model: hybrid where ``--hybrid-layer-pattern`` is given, GPT otherwise.

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
        numbers = [number for number, has_experts in enumerate(has_experts_by_layer(args), 1) if has_experts]
        config.hybrid_stack_spec = air_hybrid_stack_spec(transformer_config, config.hybrid_stack_spec, numbers)
    else:
        config.transformer_layer_spec = partial(air_layer_spec, given=config.transformer_layer_spec)
    config.pre_wrap_hooks.append(require_routers)
    if uses_hash(args):
        config.pre_wrap_hooks.append(hand_over_token_ids)
    return config


def skip_missing_state(missing: MissingState, model: list[torch.nn.Module]) -> list[torch.nn.Module]:
    """Tell the AIR routers of a model what the checkpoint does not hold, so that they do not request it.

    Args:
        missing: the state that the checkpoint does not hold.
        model: Megatron's list of model chunks.
    Returns:
        The same list, as Megatron's hooks must return it.
    """
    for router in find_routers(model, AIRRouter):
        router.missing_state = missing
    return model


def get_embedding_ranks(pp_ranks: list[int]) -> list[int]:
    """List the ranks that hold a copy of the word embeddings.

    Args:
        pp_ranks: global ranks of one pipeline, first stage first.
    Returns:
        Sorted global ranks: the first stage, the last one if the output layer shares the weights, stages with MTP.
    """
    if len(pp_ranks) == 1:
        return list(pp_ranks)
    args = get_args()
    ranks = {pp_ranks[0], *get_mtp_ranks(pp_ranks, core_transformer_config_from_args(args))}
    if not args.untie_embeddings_and_output_weights:
        ranks.add(pp_ranks[-1])
    return sorted(ranks)
