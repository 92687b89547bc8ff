"""What is said to be needed of a rank's memory is what experts and routers truly take."""

import argparse
import types

import pytest
import torch

from air_moe_megatron.command import memory
from air_moe_megatron.routers import ROUTERS as CLASSES

ARGS = dict(
    moe_router_type="air", moe_air_shard_experts=False, moe_granular_experts=True, moe_dispatch="compact",
    num_experts=16, hidden_size=8,
    moe_ffn_hidden_size=3, ffn_hidden_size=32, moe_latent_size=None, swiglu=True, quick_geglu=False, num_layers=2,
    moe_layer_freq=1, hybrid_layer_pattern=None, expert_model_parallel_size=1, expert_tensor_parallel_size=1,
    expert_gtp_weight_remat_size=1, tensor_model_parallel_size=1, pipeline_model_parallel_size=1,
    context_parallel_size=1, data_parallel_size=1, world_size=1, sequence_parallel=False, micro_batch_size=2,
    seq_length=10, params_dtype=torch.float32, accumulate_allreduce_grads_in_fp32=False, optimizer="adam",
    use_precision_aware_optimizer=False, use_distributed_optimizer=False, skip_train=False, cpu=True,
)  # fmt: skip
EXPERTS, ROUTERS = 2 * 16 * 3 * 3 * 8, 2 * 16 * 8  # parameters of both layers
KEYS = 2 * 16 * 8  # bytes of AIR's routers of both layers


def arguments(**changes):
    return argparse.Namespace(**ARGS | changes)


def needed(**changes):
    """Bytes for experts, for routers and for dense maps."""
    return tuple(memory.needed_bytes(arguments(**changes)).values())


# Changes, and bytes for experts, for routers, for dense maps.
SIZES = {
    "fp32": ({}, (EXPERTS * 16, KEYS + ROUTERS * 16, 0)),
    "plain": (dict(swiglu=False), (EXPERTS * 16 * 2 // 3, KEYS + ROUTERS * 16, 0)),
    "bf16": (
        dict(params_dtype=torch.bfloat16, accumulate_allreduce_grads_in_fp32=True),
        (EXPERTS * 18, KEYS + ROUTERS * 18, 0),
    ),
    "bf16-gradients": (dict(params_dtype=torch.bfloat16), (EXPERTS * 16, KEYS + ROUTERS * 16, 0)),
    "distributed-optimizer": (
        dict(use_distributed_optimizer=True, world_size=4, data_parallel_size=4, expert_model_parallel_size=2),
        (EXPERTS // 2 * (8 + 8 // 2), KEYS + ROUTERS * (8 + 8 // 4), 0),
    ),
    "sharded": (
        dict(
            moe_air_shard_experts=True,
            use_distributed_optimizer=True,
            world_size=4,
            data_parallel_size=4,
            expert_model_parallel_size=2,
        ),
        (EXPERTS // 2 * (8 + 8 // 2), KEYS // 2 + ROUTERS // 2 * (8 + 8 // 2), 0),
    ),
    "evaluation": (dict(skip_train=True), (EXPERTS * 4, KEYS + ROUTERS * 4, 0)),
    "sgd": (dict(optimizer="sgd"), (EXPERTS * 8, KEYS + ROUTERS * 8, 0)),
    "stock": (dict(moe_dispatch="stock"), (EXPERTS * 16, KEYS + ROUTERS * 16, 20 * 16 * 5)),
    "sequence-parallel": (
        dict(moe_dispatch="stock", sequence_parallel=True, tensor_model_parallel_size=2, context_parallel_size=2),
        (EXPERTS * 16, KEYS + ROUTERS * 16, 5 * 16 * 5),
    ),
    "stages": (
        dict(num_layers=3, pipeline_model_parallel_size=2, world_size=2),
        (EXPERTS * 16, KEYS + ROUTERS * 16, 0),
    ),
    "every-second-layer": (dict(num_layers=3, moe_layer_freq=2), (EXPERTS * 16, KEYS + ROUTERS * 16, 0)),
    "listed-layers": (dict(num_layers=3, moe_layer_freq=[0, 1, 0]), (EXPERTS * 8, KEYS // 2 + ROUTERS * 8, 0)),
    "hybrid": (dict(num_layers=4, hybrid_layer_pattern="M*EE"), (EXPERTS * 16, KEYS + ROUTERS * 16, 0)),
    "hash": (dict(moe_router_type="hash"), (EXPERTS * 16, 0, 0)),
    "first-layer-by-hash": (dict(moe_num_hash_layers=1), (EXPERTS * 16, KEYS // 2 + ROUTERS * 8, 0)),
    "vq": (dict(moe_router_type="vq"), (EXPERTS * 16, ROUTERS * 32, 0)),
}


@pytest.mark.parametrize("changes, expected", SIZES.values(), ids=SIZES)
def test_bytes_of_a_rank(changes, expected):
    assert needed(**changes) == expected


@pytest.mark.parametrize("replicas", (1, 5, 8, 16, 256))
@pytest.mark.parametrize(("dtype", "state"), [(torch.bfloat16, 12), (torch.float32, 8)], ids=("bf16", "fp32"))
def test_replicas_share_all_of_the_optimizer_state(dtype, state, replicas):
    changes = dict(params_dtype=dtype, use_distributed_optimizer=True)
    per_parameter = memory.parameter_bytes(arguments(**changes), replicas)
    assert per_parameter["optimizer state"] * replicas == pytest.approx(state)
    both = 2 * dtype.itemsize  # a weight and its gradient
    of_experts, _, _ = needed(**changes, world_size=replicas, data_parallel_size=replicas)
    assert of_experts == round(EXPERTS * (both + state / replicas))


@pytest.mark.parametrize("router_type", CLASSES)
def test_parameters_are_at_most_those_of_a_layer(megatron_cpu, router_type):
    """Experts exactly; of the routers' parameters those that there are per expert."""
    from megatron.core.transformer.moe.moe_layer import MoESubmodules

    from air_moe_megatron import AIRMoEConfig, AIRMoELayer
    from air_moe_megatron.layer.experts import GranularExperts

    counts = []
    for num_experts in (16, 64):
        config = AIRMoEConfig(
            num_layers=1, hidden_size=8, num_attention_heads=2, num_moe_experts=num_experts, moe_router_topk=4,
            moe_ffn_hidden_size=3, add_bias_linear=False, use_cpu_initialization=True, gated_linear_unit=True,
            activation_func=torch.nn.functional.silu, moe_router_load_balancing_type="none", moe_hash_vocab_size=9,
            moe_router_type=router_type, moe_granular_experts=True, moe_dispatch="compact",
        )  # fmt: skip
        layer = AIRMoELayer(
            config, MoESubmodules(experts=GranularExperts, router=CLASSES[router_type]), 1, megatron_cpu
        )
        experts, router = (sum(p.numel() for p in part.parameters()) for part in (layer.experts, layer.router))
        if router_type == "air":
            router += 2 * layer.router.index.staged_keys.numel()  # int64
        bytes_ = needed(moe_router_type=router_type, num_experts=num_experts, num_layers=1, skip_train=True)
        assert bytes_[0] == 4 * experts
        assert bytes_[1] <= 4 * router
        counts.append((bytes_[1] // 4, router))
    (few_estimated, few), (many_estimated, many) = counts
    if CLASSES[router_type].vectors_per_expert:  # these grow by as much as the estimate, groups apart
        assert many_estimated - few_estimated <= many - few <= 1.1 * (many_estimated - few_estimated)


def test_sizes_beyond_the_host_are_refused_and_say_what_there_is():
    with pytest.raises(ValueError) as error:
        memory.check_memory(arguments(num_experts=10**9, hidden_size=1024))
    message = str(error.value)
    for words in (
        "--num-experts (1000000000): a rank needs at least 305190.7 GiB",
        "274658.2 GiB for experts, 30532.5 GiB for routers",
        "GiB for each of the 1 ranks on this host",
        "--expert-model-parallel-size (1)",
    ):
        assert words in message


def test_dense_maps_count(monkeypatch):
    monkeypatch.setattr(memory, "_available_bytes", lambda args: (2**30, "here"))
    tall = dict(num_experts=2**12, seq_length=2**16, micro_batch_size=1)
    memory.check_memory(arguments(**tall))
    with pytest.raises(ValueError, match="1.2 GiB for maps of 65536 tokens .*, which --moe-dispatch compact avoids"):
        memory.check_memory(arguments(**tall, moe_dispatch="stock"))


def test_ranks_share_the_host_and_its_limit(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "_CGROUP_LIMIT", tmp_path / "memory.max")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    host, where = memory._available_bytes(arguments())
    assert 2**28 < host and where == "for each of the 2 ranks on this host"
    for text, expected in (("max\n", host), ("1000\n", 500)):
        (tmp_path / "memory.max").write_text(text)
        assert memory._available_bytes(arguments())[0] == expected


def test_a_gpu_is_asked_for_its_own(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    asked = []
    properties = types.SimpleNamespace(total_memory=5)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: asked.append(device) or properties)
    assert memory._available_bytes(arguments(cpu=False)) == (5, "on GPU 3")
    assert asked == [3]


def test_megatrons_own_router_and_experts_are_left_alone():
    memory.check_memory(arguments(moe_router_type="topk", moe_granular_experts=False, num_experts=10**12))
