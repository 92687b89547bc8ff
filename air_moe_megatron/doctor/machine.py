"""Facts about this machine: versions of the software, devices, and which backend each operation uses and why.

Torch and Megatron are imported where they are needed, because Megatron must not be imported before CPU mode is on.
"""

import argparse
import contextlib
import importlib.metadata
import importlib.util
import os
import platform
from pathlib import Path

OPERATIONS = {
    "norm": "norm of the tokens",
    "coarse": "tokens to codewords",
    "fine_scores": "scores of the shortlists",
    "ranking": "rebuild of the shortlists",
    "selected_scores": "gradients of the selected scores",
    "pair_products": "products of pairs",
    "exchange": "rows and pairs of the compact dispatch",
    "granular_experts": "the experts",
}
"""Folders under ``ops/`` that have kernels -> what the operation does."""

_DISTRIBUTIONS = {"triton": ("pytorch-triton",), "megatron": ("megatron-core",)}
"""Package -> other names under which it may be installed."""

_NVIDIAS_APEX = ("multi_tensor_apply", "optimizers", "normalization")
"""Folders of NVIDIA Apex. PyPI's unrelated package ``apex``, part of a web framework, has none of them."""


def versions() -> dict[str, str]:
    """Name -> version in words, for all software of a run."""
    import torch

    cuda = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
    nccl = "missing"
    if torch.distributed.is_nccl_available():
        nccl = ".".join(map(str, torch.cuda.nccl.version()))
    return {
        "air_moe_megatron": _version("air_moe_megatron"),
        "Python": platform.python_version(),
        "torch": f"{torch.__version__}, {cuda}",
        "megatron-core": _megatron(),
        "Triton": _version("triton"),
        "Transformer Engine": _version("transformer_engine"),
        "NVIDIA Apex": apex(),
        "NCCL": nccl,
    }


def apex() -> str:
    """State of NVIDIA Apex in words. Its folders tell it from PyPI's unrelated ``apex``; neither is imported."""
    spec = importlib.util.find_spec("apex")
    if spec is None:
        return "missing"
    version = _version("apex")
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    if not any((folder / name).is_dir() for folder in folders for name in _NVIDIAS_APEX):
        return (
            f"missing: the installed package `apex` {version} is the unrelated one of PyPI; uninstall it, and build "
            "https://github.com/NVIDIA/apex where you want Apex"
        )
    if importlib.util.find_spec("amp_C") is None:
        return f"{version}, without its CUDA extensions, so Megatron does without it"
    return version


def _version(name: str) -> str:
    if importlib.util.find_spec(name) is None:
        return "missing"
    for distribution in (name, *_DISTRIBUTIONS.get(name, ())):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(distribution)
    return "of unknown version"


def _megatron() -> str:
    from air_moe_megatron.compat import require_entry_megatron

    try:
        require_entry_megatron()
    except ImportError as error:
        return f"{_version('megatron')}: {error}"
    return importlib.metadata.version("megatron-core")


def devices() -> list[str]:
    """The devices of this machine in words."""
    import torch

    gib = 2**30
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / gib
    lines = [f"CPU: {len(os.sched_getaffinity(0))} cores, {memory:.1f} GiB, torch threads: {torch.get_num_threads()}"]
    if not torch.cuda.is_available():
        return [*lines, "GPU: none that torch sees; --cpu trains on the CPU with gloo"]
    for index in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(index)
        capability = f"sm_{found.major}{found.minor}"
        lines.append(f"GPU {index}: {found.name}, {capability}, {found.total_memory / gib:.1f} GiB")
    return lines


def backends(args: argparse.Namespace | None) -> dict[str, tuple[str, str]]:
    """Operation -> "Triton" or "torch", and why.

    Args:
        args: arguments with a router of ours, for its dtypes and sizes. None means bf16 on a GPU, fp32 on a CPU, and
            any sizes.
    """
    import torch

    from air_moe_megatron.ops.backend import explain
    from air_moe_megatron.ops.dtypes import router_dtype_of

    has_gpu = torch.cuda.is_available()
    device = torch.device("cuda", 0) if has_gpu and not getattr(args, "cpu", False) else torch.device("cpu")
    dtype = getattr(args, "params_dtype", None) or (torch.bfloat16 if has_gpu else torch.float32)
    router_dtype = router_dtype_of(getattr(args, "moe_router_dtype", None), dtype)
    sizes = _limited_sizes(args)
    dtypes = {name: [dtype, router_dtype] for name in ("fine_scores", "selected_scores")}
    chosen = {name: explain(name, device, dtypes.get(name, [dtype]), **sizes.get(name, {})) for name in OPERATIONS}
    if args is not None and args.expert_model_parallel_size == 1:
        chosen["exchange"] = "torch", "a single expert-parallel rank exchanges nothing"
    return chosen


def _limited_sizes(args: argparse.Namespace | None) -> dict[str, dict[str, int]]:
    """The sizes that kernels limit, by operation and name; empty without arguments."""
    from air_moe_megatron.config import is_plain_topk, resolve_sizes

    if args is None or is_plain_topk(args):
        return {}
    topk, ranks = args.moe_router_topk, args.expert_model_parallel_size
    sizes = {"exchange": {"num_ranks": ranks, "topk": topk}, "fine_scores": {"topk": topk}}
    if args.moe_granular_experts:
        sizes["granular_experts"] = {"ffn_hidden_size": args.moe_ffn_hidden_size or args.ffn_hidden_size}
    if args.moe_router_type == "air":
        chosen = resolve_sizes(argparse.Namespace(**vars(args), num_moe_experts=args.num_experts))
        sizes["coarse"] = {"num_probes": chosen.num_probes}
        sizes["fine_scores"] = {"topk": chosen.num_candidates, "probes": chosen.num_probes}
    return sizes
