"""AIRMoEConfig: Megatron's config with our fields, validated on construction. Imports nothing else of the package.

``fields.py`` documents every field, ``sizes.py`` chooses the automatic sizes, ``hash_layers.py`` the first layers by
hash, ``rules.py`` says which values are valid, ``refusals.py`` what cannot be combined, and ``problems.py`` defines how
checks report problems.
"""

import dataclasses

from megatron.core.transformer.transformer_config import TransformerConfig

from air_moe_megatron.config.fields import (
    LAYOUT_FIELDS,
    ROUTER_TYPES,
    AIRFields,
    balancing_losses,
    is_plain_topk,
    is_sharded,
    megatron_has_hash_layers,
    num_hash_layers,
    router_type_of,
    uses_hash,
)
from air_moe_megatron.config.hash_layers import hash_layer_config, hash_layer_numbers, layers_with_experts
from air_moe_megatron.config.problems import Problems, passed_on, problem_of, raise_first
from air_moe_megatron.config.refusals import CAUSES, REFUSALS
from air_moe_megatron.config.rules import invalid, unused, validate
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
    "LAYOUT_FIELDS",
    "REFUSALS",
    "ROUTER_TYPES",
    "AIRFields",
    "AIRMoEConfig",
    "AIRSizes",
    "GroupSizes",
    "Problems",
    "ProductKeySizes",
    "attach",
    "balancing_losses",
    "hash_layer_config",
    "hash_layer_numbers",
    "invalid",
    "is_plain_topk",
    "is_sharded",
    "layers_with_experts",
    "megatron_has_hash_layers",
    "num_hash_layers",
    "passed_on",
    "problem_of",
    "raise_first",
    "resolve_groups",
    "resolve_product_keys",
    "resolve_sizes",
    "router_type_of",
    "set_fields",
    "unused",
    "uses_hash",
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
    set_fields(config, values)
    validate(config)


def set_fields(config: TransformerConfig, values: object) -> None:
    """Set our fields on a config like :func:`attach`, without validating them."""
    for field in dataclasses.fields(AIRFields):
        setattr(config, field.name, getattr(values, field.name))
