"""The configuration of the model that a command trains or loads."""

import argparse
from functools import partial

import torch
from megatron.training.argument_utils import gpt_config_from_args, hybrid_config_from_args
from megatron.training.models import GPTModelConfig, HybridModelConfig

from air_moe_megatron.command.arguments import moe_layers, transformer_config_from_args
from air_moe_megatron.config import is_plain_topk, uses_hash
from air_moe_megatron.routers import AIRRouter, find_routers
from air_moe_megatron.routers.hashing import hand_over_token_ids
from air_moe_megatron.routers.lacking import Lacking
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
        numbers = [number for number, has_experts in enumerate(moe_layers(args), 1) if has_experts]
        config.hybrid_stack_spec = air_hybrid_stack_spec(transformer_config, config.hybrid_stack_spec, numbers)
    else:
        config.transformer_layer_spec = partial(air_layer_spec, given=config.transformer_layer_spec)
    config.pre_wrap_hooks.append(require_routers)
    if uses_hash(args):
        config.pre_wrap_hooks.append(hand_over_token_ids)
    return config


def leave_out(lacking: Lacking, model: list[torch.nn.Module]) -> list[torch.nn.Module]:
    """Tell the AIR routers of a model what the checkpoint lacks, so that they do not request it.

    Args:
        lacking: what the checkpoint lacks.
        model: Megatron's list of model chunks.
    Returns:
        The same list, as Megatron's hooks must return it.
    """
    for router in find_routers(model, AIRRouter):
        router.lacking = lacking
    return model
