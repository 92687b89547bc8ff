"""AIRMoEConfig: Megatron's config with our fields, validated on construction. Imports nothing else of the package.

``fields.py`` documents every field, ``sizes.py`` chooses the automatic sizes, ``rules.py`` says which values are valid,
and ``refusals.py`` what cannot be combined.
"""

import dataclasses

from megatron.core.transformer.transformer_config import TransformerConfig

from air_moe_megatron.config.fields import ROUTER_TYPES, AIRFields, balancing_losses, is_plain_topk, router_type_of
from air_moe_megatron.config.refusals import CAUSES, REFUSALS
from air_moe_megatron.config.rules import refuse_unused, validate
from air_moe_megatron.config.sizes import (
    AIRSizes,
    GroupSizes,
    ProductKeySizes,
    resolve_groups,
    resolve_product_keys,
    resolve_sizes,
)

__all__ = [
    "CAUSES",
    "REFUSALS",
    "ROUTER_TYPES",
    "AIRFields",
    "AIRMoEConfig",
    "AIRSizes",
    "GroupSizes",
    "ProductKeySizes",
    "attach",
    "balancing_losses",
    "is_plain_topk",
    "refuse_unused",
    "resolve_groups",
    "resolve_product_keys",
    "resolve_sizes",
    "router_type_of",
    "validate",
]


@dataclasses.dataclass
class AIRMoEConfig(TransformerConfig, AIRFields):
    """A TransformerConfig with the fields of :class:`AIRFields`, validated on construction."""

    def __post_init__(self) -> None:
        super().__post_init__()
        validate(self)


def attach(config: TransformerConfig, values: object) -> None:
    """Set our fields on a config whose class lacks them (MLA, heterogeneous layers), and validate.

    Args:
        config: any Megatron transformer config.
        values: the parsed arguments, or anything with the fields as attributes.
    Raises:
        ValueError: as :func:`validate`.
    """
    for field in dataclasses.fields(AIRFields):
        setattr(config, field.name, getattr(values, field.name))
    validate(config)
