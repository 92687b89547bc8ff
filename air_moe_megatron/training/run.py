"""A training run: parses and checks the command line, then hands over to Megatron's ``pretrain``."""

import argparse
import contextlib
import time
from collections.abc import Callable
from functools import partial
from typing import TextIO

import torch
from megatron.core.enums import ModelType
from megatron.core.package_info import __version__ as megatron_core_version
from megatron.core.utils import get_te_version, get_torch_version
from megatron.training import inprocess_restart, pretrain, print_rank_0, set_startup_timestamps
from megatron.training.argument_utils import pretrain_cfg_container_from_args
from megatron.training.config import PretrainConfigContainer
from megatron.training.global_vars import rebuild_tokenizer, set_global_variables
from megatron.training.models import GPTModelConfig

from air_moe_megatron.command import console
from air_moe_megatron.command.agreement import Ranks, check_agreement, meet
from air_moe_megatron.command.arguments import complete, megatrons_errors, parse_flags
from air_moe_megatron.command.checkpoints import check_checkpoint, parse_with_checkpoint
from air_moe_megatron.command.entry_refusals import refused_flags
from air_moe_megatron.command.forward_step import forward_step
from air_moe_megatron.command.memory import check_memory
from air_moe_megatron.command.model import get_embedding_ranks, model_config_from_args, skip_missing_state
from air_moe_megatron.command.schedule import invalid_schedules
from air_moe_megatron.config import is_plain_topk, raise_first
from air_moe_megatron.process_groups import process_groups_released
from air_moe_megatron.routers.hashing import balance_hash_tables
from air_moe_megatron.specs import mtp_specs_with_air_layers
from air_moe_megatron.step_hooks import codebook_updates
from air_moe_megatron.training.datasets import train_valid_test_datasets_provider
from air_moe_megatron.training.preflight import unfit_data
from air_moe_megatron.training.token_counts import agreed_counts


def parse() -> tuple[argparse.Namespace, Ranks]:
    """Parse the command line, with ``--use-checkpoint-args`` by :func:`parse_with_checkpoint`.

    Returns:
        Megatron's parsed and validated arguments, and the ranks of this start. Of Megatron's global variables only the
        tokenizer is set.
    Raises:
        ValueError: if flags are invalid, or the checkpoint's arguments cannot be read.
    """
    args, ranks = parse_flags(), None
    if args.use_checkpoint_args:  # Megatron reads the checkpoint to complete the arguments: check it before
        ranks = meet(args)
        args = parse_with_checkpoint(args, ranks)
    complete(args, rebuild_tokenizer)
    return args, ranks or meet(args)


def run(
    config: PretrainConfigContainer,
    pretrain_func: Callable,
    store: torch.distributed.Store | None,
    has_our_layers: bool,
    screen: TextIO | None = None,
) -> None:
    """Hand over to Megatron's training loop.

    Args:
        config: everything Megatron configures, the model included.
        pretrain_func: ``megatron.training.pretrain``, wrapped where in-process restart is on.
        store: the ``torch.distributed`` store of in-process restart, or None.
        has_our_layers: whether any layer is ours; otherwise Megatron runs without our adaptations.
        screen: stream that also gets the losses if standard output is a file, or None.
    """
    with contextlib.ExitStack() as adaptations:
        if screen is not None:
            adaptations.enter_context(console.losses_on(screen))
        if has_our_layers:
            adaptations.enter_context(mtp_specs_with_air_layers())
            adaptations.enter_context(codebook_updates())
        pretrain_func(
            config,
            train_valid_test_datasets_provider,
            ModelType.encoder_or_decoder,
            forward_step,
            store=store,
            get_embedding_ranks=get_embedding_ranks if isinstance(config.model, GPTModelConfig) else None,
        )


def train(program_start: float | None = None, screen: TextIO | None = None) -> None:
    """Parse the command line, check it, and train.

    Args:
        program_start: when the program began, in seconds since the epoch, for Megatron's report of start-up times.
        screen: stream that also gets the losses if standard output is a file, or None.
    Raises:
        SystemExit: if flags, data or checkpoint cannot work; one line says why.
    """
    main_start = time.time()
    print_rank_0(f"> PyTorch version ................ {get_torch_version()}")
    print_rank_0(f"> Megatron-Core version .......... {megatron_core_version}")
    print_rank_0(f"> Transformer Engine version ..... {get_te_version()}")
    set_startup_timestamps(program_start=program_start, main_entry=main_start)
    with console.refusals():
        args, ranks = parse()
        check_agreement(args, ranks)
        raise_first(refused_flags(args))
        raise_first(invalid_schedules(args))
        ranks.check("data", lambda: raise_first(unfit_data(args)))
        model_config = model_config_from_args(args)
        ranks.check("memory", lambda: check_memory(args))
        missing = check_checkpoint(args, model_config.transformer, ranks)
        if missing:
            model_config.pre_wrap_hooks.append(partial(skip_missing_state, missing))
        counts = agreed_counts(args, ranks)
        if counts is not None:
            model_config.pre_wrap_hooks.append(partial(balance_hash_tables, counts))
        with megatrons_errors():  # TensorBoard and W&B begin here, so a refused start leaves nothing in either
            set_global_variables(args, build_tokenizer=False)
    pretrain_func, store = inprocess_restart.maybe_wrap_for_inprocess_restart(pretrain)
    with process_groups_released():
        run(pretrain_cfg_container_from_args(args, model_config), pretrain_func, store, not is_plain_topk(args), screen)
