"""Command-line flags, generated from the fields of ``config.py``, and the config made from them."""

from megatron.training.argument_utils import ArgumentGroupFactory, core_transformer_config_from_args

from air_moe_megatron.config import AIRFields, AIRMoEConfig, attach


def add_air_arguments(parser):
    """Add the flags of AIR-MoE to Megatron's parser and return it, as an ``extra_args_provider`` must."""
    ArgumentGroupFactory(AIRFields).build_group(parser, title="AIR-MoE")
    return parser


def transformer_config_from_args(args):
    """The transformer config of the arguments: Megatron's own class for the top-k router, else one with our fields.

    Raises:
        ValueError: naming the field, value and rule that the arguments break.
    """
    if args.moe_router_type == "topk":
        return core_transformer_config_from_args(args)
    config = core_transformer_config_from_args(args, AIRMoEConfig)
    if not isinstance(config, AIRMoEConfig):
        attach(config, args)  # multi-latent attention and heterogeneous layers bring config classes of their own
    return config
