"""A hybrid stack of attention and MoE layers made of Megatron's local modules, for ``--spec``.

Megatron's own stack spec, and the last norm of its stack, need Transformer Engine.
"""

import copy

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_submodules
from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
from megatron.core.transformer.identity_op import IdentityFuncOp, IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_layer import MoETransformerLayer, TransformerLayer


class LocalHybridStack(HybridStack):
    """Megatron's stack, with torch's norm at its end."""

    def __init__(self, config, submodules, post_layer_norm=True, **kwargs):
        super().__init__(config, submodules, post_layer_norm=False, **kwargs)
        self.post_layer_norm = post_layer_norm
        if self.post_process and post_layer_norm:
            self.final_norm = WrappedTorchNorm(config, config.hidden_size, eps=config.layernorm_epsilon)


def _part_of_a_gpt_layer(layer, **without):
    submodules = copy.copy(get_gpt_layer_local_submodules(num_experts=8, normalization="RMSNorm"))
    for name, nothing in without.items():
        setattr(submodules, name, nothing)
    submodules.sharded_state_dict_keys_map = {}
    return ModuleSpec(module=layer, submodules=submodules)


stack_spec = ModuleSpec(
    module=LocalHybridStack,
    submodules=HybridStackSubmodules(
        attention_layer=_part_of_a_gpt_layer(
            TransformerLayer, pre_mlp_layernorm=IdentityOp, mlp=IdentityOp, mlp_bda=IdentityFuncOp
        ),
        moe_layer=_part_of_a_gpt_layer(
            MoETransformerLayer, input_layernorm=IdentityOp, self_attention=IdentityOp, self_attn_bda=IdentityFuncOp
        ),
    ),
)
