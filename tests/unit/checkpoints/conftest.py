"""Fixtures that save small checkpoints, and check a run against them."""

import argparse
import copy
import sys
from pathlib import Path

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor

from air_moe_megatron.routers.missing_state import MissingState
from tests.megatron.conftest import MODEL
from tests.saved import ALONE, HIDDEN, LAYERS, tensors_of


@pytest.fixture(scope="module")
def parsed() -> argparse.Namespace:
    """Megatron's validated arguments of a small top-k model."""
    from megatron.training.arguments import parse_args, validate_args

    from air_moe_megatron import cpu
    from air_moe_megatron.command.arguments import extra_args_provider

    cpu.enable()
    argv, sys.argv = sys.argv, cpu.with_required_flags(["pretrain", "--cpu", *map(str, MODEL), "--mock-data"])
    try:
        args = parse_args(extra_args_provider)
        validate_args(args, {})
    finally:
        sys.argv = argv
        cpu.disable()
    return args


@pytest.fixture
def save(parsed, megatron_cpu, tmp_path):
    """A function that saves a small checkpoint: arguments that differ from top-k's -> its folder."""

    def save(iteration=2, tensors=None, args=True, is_legacy=False, **changes) -> Path:
        folder = tmp_path / "saved"
        directory = folder / f"iter_{iteration:07d}"
        saved_by = argparse.Namespace(**vars(parsed) | changes)
        tensors = tensors_of(saved_by) if tensors is None else tensors
        state = {"args": saved_by, "iteration": iteration} if args else {"iteration": iteration}
        if is_legacy:
            expert_parallel = saved_by.expert_model_parallel_size
            state["model"] = {
                f"decoder.layers.{layer}.mlp.{name}": value
                for layer in range(LAYERS)
                for name, value in tensors.items()
            }
            for rank in range(expert_parallel):
                name = "mp_rank_00" if expert_parallel == 1 else f"mp_rank_00_{rank:03d}"
                (directory / name).mkdir(parents=True)
                torch.save(state | {"optimizer": {}}, directory / name / "model_optim_rng.pt")
        else:
            directory.mkdir(parents=True)
            keys = {f"decoder.layers.mlp.{name}": value for name, value in tensors.items()}
            keys = {key: value.expand(LAYERS, *value.shape).contiguous() for key, value in keys.items()}
            if not saved_by.no_save_optim:
                kinds = ["exp_avg", "fp32_param"] if saved_by.bf16 else ["exp_avg"]
                prefix = "distributed.dp_group_idx_0" if saved_by.use_distributed_optimizer else "state"
                keys |= {f"optimizer.{prefix}.{kind}.decoder.final.weight": torch.zeros(HIDDEN) for kind in kinds}
            sharded = {key: ShardedTensor.from_rank_offsets(key, value) for key, value in keys.items()}
            dist_checkpointing.save(state | sharded, str(directory))
        (folder / "latest_checkpointed_iteration.txt").write_text(str(iteration))
        return folder

    return save


@pytest.fixture
def check(parsed, megatron_cpu):
    """A function that checks a run: its arguments that differ from top-k's -> what the checkpoint lacks."""

    def check(ranks=ALONE, **changes) -> MissingState:
        from air_moe_megatron.command.arguments import transformer_config_from_args
        from air_moe_megatron.command.checkpoints import check_checkpoint

        changes = {name: str(value) if isinstance(value, Path) else value for name, value in changes.items()}
        args = copy.copy(parsed)
        vars(args).update(changes)
        return check_checkpoint(args, transformer_config_from_args(args), ranks)

    return check


@pytest.fixture(params=[False, True], ids=["torch_dist", "legacy"])
def is_legacy(request) -> bool:
    return request.param
