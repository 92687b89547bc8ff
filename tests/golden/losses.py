"""Golden losses: a tiny GPT trained with every router type, and the loss of each step at full precision.

A change that is meant to keep all numbers must keep these. `make golden` writes losses.json anew, for a change that is
meant to move them; its commit says why they moved.
"""

import json
from pathlib import Path

import torch

from air_moe_megatron.routers.hashing import hand_over_token_ids
from air_moe_megatron.specs import with_air_layers
from air_moe_megatron.sync import discard_statistics, update_codebooks
from tests.builders import make_config

FILE = Path(__file__).parent / "losses.json"
STEPS, BATCH, SEQUENCE, VOCABULARY = 20, 4, 16, 32
BALANCE = dict(moe_router_load_balancing_type="aux_loss", moe_aux_loss_coeff=0.01)
NORM = dict(moe_router_input_norm="running")
CASES = {
    "topk": dict(moe_router_type="topk", **BALANCE, **NORM),
    "air": dict(moe_router_type="air", **BALANCE, **NORM),
    "air-low-rank-whitening": dict(
        moe_router_type="air", moe_router_input_norm="low_rank_whitening", **BALANCE,
    ),
    "air-several-probes": dict(moe_router_type="air", moe_air_num_probes=2, moe_air_num_candidates=8, **BALANCE),
    # Few clusters: one that is a single expert's own direction makes ties that rounding decides.
    "air-codebook-of-experts": dict(
        moe_router_type="air", moe_air_codebook_source="experts", moe_air_num_clusters=8, moe_air_num_probes=2,
        moe_z_loss_coeff=0.001,
    ),
    "product_key": dict(moe_router_type="product_key", **BALANCE),
    "hierarchical": dict(moe_router_type="hierarchical", **BALANCE, **NORM),
    "hash": dict(moe_router_type="hash"),
    "air-behind-a-hash-layer": dict(moe_router_type="air", moe_num_hash_layers=1, **BALANCE, **NORM),
    "vq": dict(moe_router_type="vq", **NORM),
}  # fmt: skip


def train(groups, **fields) -> list[float]:
    """The loss of each of 20 steps, before the step's update, on the compact path in fp32.

    The optimizer is plain SGD: Adam would divide rounding errors of tiny gradients by themselves.
    """
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    torch.manual_seed(1)
    config = make_config(
        num_layers=2, moe_ffn_hidden_size=2, init_method_std=0.2, hidden_dropout=0.0, attention_dropout=0.0,
        masked_softmax_fusion=False, bias_dropout_fusion=False, gradient_accumulation_fusion=False, **fields,
    )  # fmt: skip
    spec = with_air_layers(get_gpt_layer_local_spec(num_experts=config.num_moe_experts, moe_grouped_gemm=False), config)
    model = GPTModel(config, spec, VOCABULARY, SEQUENCE, pg_collection=groups)
    hand_over_token_ids([model.train()])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    mask = torch.ones(1, 1, SEQUENCE, SEQUENCE, dtype=torch.bool).triu(1)  # True: not attended to
    positions = torch.arange(SEQUENCE).expand(BATCH, SEQUENCE)
    losses = []
    for step in range(STEPS):
        text = counting_text(step)
        discard_statistics(model)
        loss = model(text[:, :-1], positions, mask, labels=text[:, 1:]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        update_codebooks(model)
        losses.append(loss.item())
    return losses


def counting_text(step: int) -> torch.Tensor:
    """[B, S + 1] token ids: every sequence counts by a number of its own, so there is something to learn."""
    generator = torch.Generator().manual_seed(step)
    starts = torch.randint(VOCABULARY, (BATCH, 1), generator=generator)
    strides = torch.randint(1, 4, (BATCH, 1), generator=generator)
    return (starts + strides * torch.arange(SEQUENCE + 1)) % VOCABULARY


def main() -> None:
    """Write the losses of all cases."""
    from tests.conftest import cpu_world

    with cpu_world() as groups:
        found = {name: train(groups, **fields) for name, fields in CASES.items()}
    lines = ",\n".join(f'  "{name}": {json.dumps(losses)}' for name, losses in found.items())
    FILE.write_text(f"{{\n{lines}\n}}\n")


if __name__ == "__main__":
    main()
