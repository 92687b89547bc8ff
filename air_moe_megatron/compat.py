"""Which Megatron this is: the only home of version checks."""

import argparse
import dataclasses

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
    """Whether this Megatron is a checkout with ``patches/`` applied, which honours the flags itself."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    return "moe_router_type" in {field.name for field in dataclasses.fields(TransformerConfig)}


def repair_help(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Escape stray percent signs in help texts: with the one of megatron-core 0.19's own, ``--help`` would crash."""
    for action in parser._actions:
        try:
            (action.help or "") % vars(action)
        except (ValueError, TypeError, KeyError):
            action.help = action.help.replace("%", "%%")
    return parser
