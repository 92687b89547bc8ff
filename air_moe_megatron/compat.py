"""Version checks of Megatron, and what it leaves undone."""

import argparse
import contextlib
import dataclasses
import gc
from collections.abc import Iterator

import torch
from packaging.version import Version

SUPPORTED_MEGATRON = ("0.19", "0.20")
"""megatron-core versions that this package accepts: from the first, below the second. The tests run on 0.19.2."""


def require_supported_megatron() -> None:
    """Check the installed Megatron before anything is built on it.

    Raises:
        ImportError: naming the installed and the supported versions.
    """
    first, end = (Version(version) for version in SUPPORTED_MEGATRON)
    try:
        from megatron.core.package_info import __version__ as version
    except ImportError as error:
        raise ImportError("air_moe_megatron needs megatron-core 0.19; install air_moe_megatron[train]") from error
    if not first <= Version(Version(version).base_version) < end:
        raise ImportError(f"megatron-core {version} is not supported: air_moe_megatron needs >= {first}, < {end}")


def megatron_has_our_fields() -> bool:
    """Whether this Megatron is a checkout with ``patches/`` applied, which honors the flags itself."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    return "moe_router_type" in {field.name for field in dataclasses.fields(TransformerConfig)}


def release_process_groups() -> None:
    """End the process groups of a finished run with their threads; without a process group, do nothing.

    Megatron leaves that to the end of the process. Then a thread of gloo that drops its last tensor while Python shuts
    down aborts the process ("terminate called without an active exception"), after all work was done.
    """
    from megatron.core import parallel_state

    if torch.distributed.is_initialized():
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()
        gc.collect()  # a group's threads are joined when nothing refers to it any more


@contextlib.contextmanager
def process_groups_released() -> Iterator[None]:
    """A context that ends with `release_process_groups`, also where Megatron ends a run early.

    `--exit-interval`, `--exit-duration-in-mins` and the exit signals end Megatron's loop by SystemExit, on all ranks.
    Other exceptions pass at once: a group may then wait for a rank that has failed.
    """
    try:
        yield
    except SystemExit:
        release_process_groups()
        raise
    release_process_groups()


def repair_help(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Escape stray percent signs in help texts: megatron-core 0.19 has one, with which ``--help`` crashes."""
    for action in parser._actions:
        try:
            (action.help or "") % vars(action)
        except (ValueError, TypeError, KeyError):
            action.help = action.help.replace("%", "%%")
    return parser
