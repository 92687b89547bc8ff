"""Command-line flags, generated from the fields of ``config.py``, and the config made from them."""

from dataclasses import fields

from megatron.training.argument_utils import ArgumentGroupFactory, core_transformer_config_from_args

from air_moe_megatron.compat import megatron_has_our_fields
from air_moe_megatron.config import AIRFields, AIRMoEConfig, attach


def add_air_arguments(parser):
    """Add the flags of AIR-MoE to Megatron's parser and return it, as an ``extra_args_provider`` must.

    A checkout with ``patches/`` applied has made them from its own config already.
    """
    if not megatron_has_our_fields():
        ArgumentGroupFactory(AIRFields).build_group(parser, title="AIR-MoE")
    return parser


def flag_of(field_name: str) -> str:
    """The flag of a field: ``moe_air_num_probes`` -> ``--moe-air-num-probes``."""
    return "--" + field_name.replace("_", "-")


def transformer_config_from_args(args):
    """The transformer config of the arguments: Megatron's own class for the top-k router, else one with our fields.

    Raises:
        ValueError: naming the field, value and rule that the arguments break.
    """
    if args.moe_router_type == "topk":
        _refuse_unused(args)
        return core_transformer_config_from_args(args)
    config = core_transformer_config_from_args(args, AIRMoEConfig)
    if not isinstance(config, AIRMoEConfig):
        attach(config, args)  # multi-latent attention and heterogeneous layers bring config classes of their own
    return config


def _refuse_unused(args):
    changed = [field for field in fields(AIRFields) if getattr(args, field.name) != field.default]
    if changed:
        field = changed[0]
        raise ValueError(
            f"{flag_of(field.name)} ({getattr(args, field.name)!r}) has no effect with --moe-router-type topk; "
            "add --moe-router-type air or leave it out"
        )
