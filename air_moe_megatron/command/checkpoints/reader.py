"""Find and read the checkpoint that a run will load, without running any code in it."""

import argparse
import contextlib
import json
import pickle
import re
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from megatron.core.datasets.object_storage_utils import is_object_storage_path
from megatron.core.dist_checkpointing.core import CONFIG_FNAME
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.msc_utils import maybe_msc
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

TRACKER = "latest_checkpointed_iteration.txt"
_RELEASE = "release"
_ITERATION = re.compile(r"iter_(\d{7,})")
_NON_PERSISTENT = "non_persistent"
"""Folder within that of ``--load`` in which Megatron keeps only the latest checkpoint."""

_UNCHECKED_FORMATS = ("torch_dcp", "fsdp_dtensor")
"""Formats of FSDP, which is refused except for plain top-k models (``entry_refusals.py``)."""

_METADATA = ".metadata"
_COMMON_FILE = "common.pt"
_COMMON_KEY = ShardedObject("common_state", None, (1,), (0,)).unique_key
LEGACY_FILE = "model_optim_rng.pt"

_METADATA_CLASSES = {
    *(
        ("torch.distributed.checkpoint.metadata", name)
        for name in (
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        )
    ),
    # The ranks' plans, which Megatron adds to the metadata; torch 2.11 drops them, 2.14 saves them.
    *(
        ("torch.distributed.checkpoint.planner", name)
        for name in ("BytesIOWriteData", "SavePlan", "TensorWriteData", "WriteItem", "WriteItemType")
    ),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
    ("collections", "OrderedDict"),
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),
}
"""The classes of a checkpoint's metadata as a pickle names them; dtypes are also admitted."""


class Damaged(Exception):
    """A checkpoint cannot be loaded; the message names the file and what is wrong with it."""


@dataclass(frozen=True)
class Location:
    """The folder of one saved iteration, and the flag that leads to it."""

    flag: str
    folder: str
    name: str  # "iter_0000004", or "release"

    @property
    def directory(self) -> Path:
        """The iteration's own folder; in object storage a path object of the storage client."""
        return maybe_msc.Path(self.folder) / self.name

    def __str__(self) -> str:
        return f"{self.flag} '{self.directory}'"


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds, without the values of its tensors."""

    location: Location
    is_legacy: bool  # Megatron's `torch` format: one file per rank, layers one by one
    shapes: dict[str, tuple[int, ...]]  # of the model's tensors: global, or in the legacy format those of one rank
    optimizer_keys: tuple[str, ...]
    args: argparse.Namespace | None  # of the run that saved it; None where it holds none that is safe to read

    def has(self, ending: str) -> bool:
        """Whether the name of any tensor of the model ends with ``ending``."""
        return any(key.endswith(ending) for key in self.shapes)


def locate(args: argparse.Namespace) -> Location | None:
    """Find the checkpoint that Megatron will load.

    Returns:
        its location; None for formats that are not checked, and for a run that starts from scratch (no ``--load``, or
        one that names the new or empty folder of ``--save``).
    Raises:
        ValueError: if a flag names a place without a checkpoint, or the tracker file is missing or garbled.
    """
    if args.ckpt_format in _UNCHECKED_FORMATS:
        return None
    flags = (("--load", args.load), ("--pretrained-checkpoint", args.pretrained_checkpoint))
    given = [(flag, folder) for flag, folder in flags if folder is not None]
    for flag, folder in given:
        location = _location_in(flag, folder, args)
        if location is not None:
            return location
        _refuse_parts(flag, folder, takes_step=len(given) == 1 and flag == "--load")
    if not given or _starts_here(args):
        return None
    raise ValueError(
        f"--load '{args.load}' holds no checkpoint: name a folder that does; only the folder that --save names too may "
        "be new or empty, for a run that starts from scratch"
    )


def _location_in(flag: str, folder: str, args: argparse.Namespace) -> Location | None:
    """The checkpoint that Megatron will take from one folder; None if the folder names none."""
    name = _latest(flag, folder)
    if args.ckpt_step and (name is not None or args.pretrained_checkpoint is None):
        name = _name_of(args.ckpt_step)  # for --load alone Megatron then needs no tracker file
    if args.non_persistent_ckpt_type == "global":
        newer = args.non_persistent_global_ckpt_dir or str(maybe_msc.Path(folder) / _NON_PERSISTENT)
        other = _latest(flag, newer)
        if other is not None and (name is None or _number_of(other) >= _number_of(name)):
            return Location(flag, newer, other)
    return None if name is None else Location(flag, folder, name)


def _refuse_parts(flag: str, folder: str, takes_step: bool) -> None:
    """Refuse a folder without a tracker file that holds iterations, a part of one or, to fine-tune from, nothing."""
    if _iterations(folder):
        tracker = maybe_msc.Path(folder) / TRACKER
        remedy = advice(folder) if takes_step else "write one of them into it"
        raise ValueError(f"{flag} '{folder}' holds iterations, but '{tracker}' is missing; {remedy}")
    part = _part_of_checkpoint(folder)
    if part is not None:
        raise ValueError(
            f"{flag} '{folder}' holds {part}, a part of a checkpoint, but no file '{TRACKER}': name the folder "
            "that holds the iterations"
        )
    if flag == "--pretrained-checkpoint":
        raise ValueError(f"--pretrained-checkpoint '{folder}' holds no checkpoint: '{TRACKER}' is missing")


def read(location: Location) -> Checkpoint:
    """Read what a checkpoint holds, and check that its files exist and are long enough.

    Values of tensors are not read, and no code in the files is run.

    Raises:
        Damaged: naming the file and what is wrong with it.
    """
    directory = location.directory
    if not directory.is_dir():
        raise Damaged(f"the folder '{directory}' is missing")
    with _reading(directory):
        names = {path.name for path in directory.iterdir()}
    if CONFIG_FNAME in names:
        return _read_torch_dist(location)
    if any(name.startswith("mp_rank_") for name in names):
        return _read_legacy(location)
    if _METADATA in names or any(name.endswith(".distcp") for name in names):
        raise Damaged(f"'{directory / CONFIG_FNAME}' is missing")
    raise Damaged(f"'{directory}' holds no file of a checkpoint")


def advice(folder: str, damaged: str | None = None) -> str:
    """Name the newest undamaged iteration of a folder, if possible before ``damaged``, and the flag that loads it."""
    names = [name for name in _iterations(folder) if name != damaged]
    limit = None if damaged is None else _number_of(damaged)
    names.sort(key=lambda name: (limit is None or _number_of(name) < limit, _number_of(name)), reverse=True)
    for name in names:
        with contextlib.suppress(Damaged):
            read(Location("--load", folder, name))
            return f"iteration {_number_of(name)} is whole: add --ckpt-step {_number_of(name)} to load it"
    return "no other iteration in this folder is whole" if damaged else "no iteration in this folder is whole"


def holds_checkpoint(folder: str) -> str | None:
    """The name of a checkpoint, or of a part of one, in a folder; None if it holds none or does not exist."""
    return next(iter(sorted(_iterations(folder))), None) or _part_of_checkpoint(folder)


def _latest(flag: str, folder: str) -> str | None:
    """The iteration that the tracker file of a folder names; None without such a file."""
    tracker = maybe_msc.Path(folder) / TRACKER
    if not tracker.is_file():
        return None
    try:
        content = tracker.read_bytes().decode(errors="replace").strip()
    except OSError as error:
        raise ValueError(f"{flag} '{folder}': '{tracker}' cannot be read ({error.strerror})") from error
    if content == _RELEASE:
        return _RELEASE
    if not re.fullmatch(r"\+?\d+", content, re.ASCII):
        # Megatron stops at such a file whatever --ckpt-step says.
        raise ValueError(
            f"{flag} '{folder}' is damaged: '{tracker}' holds {content[:40]!r} instead of an iteration; "
            f"{advice(folder)}, and remove that file"
        )
    return _name_of(int(content))


def _name_of(iteration: int) -> str:
    return f"iter_{iteration:07d}"


def _number_of(name: str) -> int:
    return 0 if name == _RELEASE else int(name.removeprefix("iter_"))


def _iterations(folder: str) -> list[str]:
    """Names of the iterations in a folder; empty if it does not exist."""
    path = maybe_msc.Path(folder)
    return [entry.name for entry in path.iterdir() if _ITERATION.fullmatch(entry.name)] if path.is_dir() else []


def _part_of_checkpoint(folder: str) -> str | None:
    """The name of a file or folder that belongs to a checkpoint; None if the folder has none."""
    path = maybe_msc.Path(folder)
    names = sorted(entry.name for entry in path.iterdir()) if path.is_dir() else []
    parts = (TRACKER, _RELEASE, CONFIG_FNAME, _METADATA)
    return next((name for name in names if name in parts or name.startswith("mp_rank_")), None)


def _starts_here(args: argparse.Namespace) -> bool:
    """Whether ``--load`` names the folder of ``--save``, so that the run may start from scratch there."""
    if args.save is None or args.skip_train or args.exit_on_missing_checkpoint:
        return False
    return args.load == args.save or Path(args.load).resolve() == Path(args.save).resolve()


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn every error into :class:`Damaged`: garbled bytes raise errors of any kind."""
    try:
        yield
    except FileNotFoundError as error:
        raise Damaged(f"'{path}' is missing") from error
    except Damaged:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:160]
        raise Damaged(f"'{path}' cannot be read ({type(error).__name__}{': ' if reason else ''}{reason})") from error


class _MetadataUnpickler(pickle.Unpickler):
    """Admits only the classes of metadata, so that reading it runs no code of the checkpoint."""

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or (module, name) in _METADATA_CLASSES:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is no part of a checkpoint's metadata")


def _read_torch_dist(location: Location) -> Checkpoint:
    directory = location.directory
    with _reading(directory / CONFIG_FNAME):
        backend = json.loads((directory / CONFIG_FNAME).read_bytes())["sharded_backend"]
        if backend != "torch_dist":
            raise Damaged(f"its format {backend!r} is not 'torch_dist', the only one that Megatron-Core 0.19 loads")
    with _reading(directory / _METADATA), (directory / _METADATA).open("rb") as file:
        metadata = _MetadataUnpickler(file).load()
        if not isinstance(metadata, Metadata):
            raise Damaged(f"'{directory / _METADATA}' does not hold a checkpoint's metadata")
        needed: dict[str, int] = {}
        for info in metadata.storage_data.values():
            needed[info.relative_path] = max(needed.get(info.relative_path, 0), info.offset + info.length)
        sizes = {
            key: tuple(entry.size)
            for key, entry in metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }
    for name, num_bytes in needed.items():
        with _reading(directory / name):
            found = (directory / name).stat().st_size
        if found < num_bytes:
            raise Damaged(f"'{directory / name}' has {found} bytes where {_METADATA} needs {num_bytes}")
    optimizer_keys = tuple(key for key in sizes if _is_of_optimizer(key))
    return Checkpoint(
        location,
        is_legacy=False,
        shapes={key: size for key, size in sizes.items() if not _is_of_optimizer(key)},
        optimizer_keys=optimizer_keys,
        args=_common_state(directory, metadata).get("args"),
    )


def _is_of_optimizer(key: str) -> bool:
    return key.startswith(("optimizer.", "chained_"))


def _common_state(directory: Path, metadata: Metadata) -> dict[str, Any]:
    """The state saved once for all ranks, arguments included; empty if it is not safe to read."""
    infos = [info for index, info in metadata.storage_data.items() if index.fqn == _COMMON_KEY]
    path = directory / (infos[0].relative_path if infos else _COMMON_FILE)
    with _reading(path), path.open("rb") as file:
        if infos:
            file.seek(infos[0].offset)
        content = BytesIO(file.read(infos[0].length if infos else -1))
        # Loading such objects would run code.
        if torch.serialization.get_unsafe_globals_in_checkpoint(content):
            return {}
        content.seek(0)
        state = torch.load(content, map_location="cpu", weights_only=True)
        return state[0] if infos else state


def _read_legacy(location: Location) -> Checkpoint:
    """Read the file of one rank, after checking that the files of all ranks are complete."""
    folders = sorted(path for path in location.directory.iterdir() if path.name.startswith("mp_rank_"))
    paths = [folder / LEGACY_FILE for folder in folders]
    for path in paths:
        with _reading(path), path.open("rb") as file:
            zipfile.ZipFile(file).close()  # the directory of a zip file is at its end: a truncated file has none
    with _reading(paths[0]):
        mmap = not is_object_storage_path(str(paths[0]))
        state = maybe_msc.torch.load(str(paths[0]), map_location="cpu", weights_only=True, mmap=mmap)
        models = [value for key, value in state.items() if re.fullmatch(r"model\d*", key)]
        return Checkpoint(
            location,
            is_legacy=True,
            shapes={
                key: tuple(value.shape)
                for model in models
                for key, value in model.items()
                if isinstance(value, torch.Tensor)
            },
            optimizer_keys=("optimizer",) if "optimizer" in state else (),
            args=state.get("args"),
        )
