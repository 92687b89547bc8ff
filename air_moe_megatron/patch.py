"""Put our flags into a checkout or an installed wheel: ``python -m air_moe_megatron.patch apply|check|revert PATH``.

PATH is a checkout, or the folder that holds the package ``megatron``. This module applies the files of ``patches/``
itself, without ``git apply`` or ``patch``. ``git apply`` skips files in a repository that does not track them, such as
a virtual environment inside a checkout. ``patch`` is missing from slim containers, and also applies a hunk where its
context only resembles the text. Here every hunk must match exactly once, in every file, before any file is written.
Lines that you changed elsewhere in these files are kept.

The exit code is 0 if all is done or in place, 1 if ``check`` finds the patch not applied, 2 if the tree is refused.
"""

import argparse
import ast
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

PATCHES = Path(__file__).parent / "patches"
"""One patch per minor version of Megatron, named by its first tag."""

_HUNK = re.compile(r"@@ -\d+(?:,\d+)? \+\d+(?:,\d+)? @@")
_OF_OURS = "air_moe_megatron"


class UnknownTreeError(ValueError):
    """The tree is not one that a patch was made for; the message names the file."""


@dataclass(frozen=True)
class Hunk:
    """One place in a file: its lines before and after the patch, with line ends."""

    before: str
    after: str

    @property
    def num_added(self) -> int:
        """Number of lines that the patch adds here."""
        return self.after.count("\n") - self.before.count("\n")


@dataclass(frozen=True)
class State:
    """Which files of a tree are patched, and their texts after the opposite action."""

    root: Path
    version: str
    applied: dict[str, str]  # patched file -> its text without the patch
    clean: dict[str, str]  # unpatched file -> its text with the patch
    patch: dict[str, list[Hunk]]

    @property
    def word(self) -> str:
        """ "applied", "not applied" or "half applied"."""
        if not self.clean:
            return "applied"
        return "half applied" if self.applied else "not applied"


def available() -> dict[str, Path]:
    """The patches: minor version of Megatron, such as "0.19" -> path of its patch."""
    found = {}
    for path in sorted(PATCHES.glob("core_v*.patch")):
        major, minor, _ = path.stem.removeprefix("core_v").split(".")
        found[f"{major}.{minor}"] = path
    return found


def parse_patch(text: str) -> dict[str, list[Hunk]]:
    """Parse a unified diff into the hunks of each file.

    Example: a hunk of the lines " a", "+b", " c" is ``Hunk("a\\nc\\n", "a\\nb\\nc\\n")``.
    """
    files: dict[str, list[Hunk]] = {}
    hunks: list[tuple[list[str], list[str]]] = []
    for line in text.splitlines(keepends=True):
        if line.startswith("+++ b/"):
            hunks = []
            files[line.removeprefix("+++ b/").strip()] = hunks
        elif _HUNK.match(line):
            hunks.append(([], []))
        elif line.startswith("diff "):
            hunks = []
        elif hunks and line[0] in " +-":
            before, after = hunks[-1]
            if line[0] != "+":
                before.append(line[1:])
            if line[0] != "-":
                after.append(line[1:])
    return {file: [Hunk("".join(before), "".join(after)) for before, after in places] for file, places in files.items()}


def find_root(path: Path) -> Path:
    """The folder that holds the package ``megatron``: the path itself, or its parent if the path is the package.

    Raises:
        UnknownTreeError: if neither is; the message names the missing file.
    """
    marker = Path("megatron/core/package_info.py")
    for root in (path, path.parent):
        if (root / marker).is_file() and (root == path or path.name == "megatron"):
            return root
    raise UnknownTreeError(
        f"{path / marker} does not exist: {path} is neither a Megatron-LM checkout nor a folder with it"
    )


def _read(file: Path) -> str:
    """A file's text, with its ends of lines.

    Raises:
        UnknownTreeError: if it is not UTF-8.
    """
    try:
        with open(file, encoding="utf-8", newline="") as stream:
            return stream.read()
    except UnicodeDecodeError as error:
        raise UnknownTreeError(f"{file} is not UTF-8: {error.reason} at byte {error.start}") from error


def version_of(root: Path) -> str:
    """The version that a tree's ``package_info.py`` states; imports nothing from the tree.

    Raises:
        UnknownTreeError: if the file states no version.
    """
    file = root / "megatron/core/package_info.py"
    values = {
        node.targets[0].id: node.value.value
        for node in ast.parse(_read(file), filename=str(file)).body
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Name)
        and isinstance(node.value, ast.Constant)
    }
    try:
        return f"{values['MAJOR']}.{values['MINOR']}.{values['PATCH']}"
    except KeyError as missing:
        raise UnknownTreeError(f"{file} states no version: {missing} is missing") from None


def examine(path: Path) -> State:
    """Compare a tree with the patch of its version. Reads only.

    Raises:
        UnknownTreeError: if there is no patch for the version, a file is missing, hunks of a file are applied only in
            part, or a hunk matches nowhere or more than once.
    """
    root = find_root(path)
    version = version_of(root)
    minor = ".".join(version.split(".")[:2])
    patches = available()
    if minor not in patches:
        raise UnknownTreeError(
            f"{root / 'megatron/core/package_info.py'} is of Megatron {version}: there are patches for "
            f"{', '.join(patches)} only"
        )
    patch = parse_patch(patches[minor].read_text(encoding="utf-8"))
    applied, clean = {}, {}
    for file, hunks in patch.items():
        if not (root / file).is_file():
            raise UnknownTreeError(f"{root / file} does not exist")
        text = _read(root / file)
        found = ["after" if _count(text, hunk.after) == 1 else "before" for hunk in hunks]
        for number, (hunk, side) in enumerate(zip(hunks, found, strict=True), 1):
            if _count(text, getattr(hunk, side)) != 1 or side != found[0]:
                raise UnknownTreeError(_why_unknown(root / file, text, hunks, number, patches[minor].name))
        if found[0] == "after":
            applied[file] = _replace(text, [(hunk.after, hunk.before) for hunk in hunks])
        else:
            clean[file] = _replace(text, [(hunk.before, hunk.after) for hunk in hunks])
    return State(root, version, applied, clean, patch)


def _why_unknown(file: Path, text: str, hunks: list[Hunk], number: int, patch: str) -> str:
    hunk = hunks[number - 1]
    words = f"{file} is not as {patch} expects, at its place {number} of {len(hunks)}"
    if any(_count(text, other.after) == 1 for other in hunks):
        return f"{words}: the patch is there in part; undo by hand what was changed there, or take a fresh file"
    if "moe_router_type" in text or _OF_OURS in text:
        return f"{words}: it holds another version of this patch; revert that with the version that applied it"
    count = _count(text, hunk.before)
    first = next(line for line in hunk.before.splitlines() if line.strip()).strip()
    return f"{words}: the lines from {first!r} were found {count} times instead of once"


def _count(text: str, lines: str) -> int:
    """How often ``lines`` occur as whole lines in a text, whatever its line ends."""
    return ("\n" + _unix(text)).count("\n" + lines)


def _unix(text: str) -> str:
    return text.replace("\r\n", "\n")


def _replace(text: str, changes: list[tuple[str, str]]) -> str:
    new = "\n" + _unix(text)
    for old, replacement in changes:
        new = new.replace("\n" + old, "\n" + replacement)
    return new[1:].replace("\n", "\r\n") if "\r\n" in text else new[1:]


def write(root: Path, files: dict[str, str]) -> None:
    """Write all files or none: first into temporary files in the same folders, which then replace the originals.

    Raises:
        OSError: if a file cannot be written; files that were already replaced are restored.
    """
    for file, text in files.items():
        ast.parse(text, filename=file)
    new, old = {}, {}
    try:
        for file, text in files.items():
            new[file] = _beside(root / file, text)
            old[file] = _beside(root / file, _read(root / file))
        try:
            done = []
            for file in files:
                done.append(file)
                os.replace(new[file], root / file)
        except BaseException:
            for file in done:
                os.replace(old[file], root / file)
            raise
    finally:
        for leftover in (*new.values(), *old.values()):
            leftover.unlink(missing_ok=True)


def _beside(path: Path, text: str) -> Path:
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    with open(handle, "w", encoding="utf-8", newline="") as stream:
        stream.write(text)
    shutil.copymode(path, name)
    return Path(name)


def run(action: str, path: Path) -> tuple[str, int]:
    """Apply, check or revert.

    Args:
        action: "apply", "check" or "revert".
        path: the tree.
    Returns:
        a text that says what was done, and the exit code.
    Raises:
        UnknownTreeError: as :func:`examine`; nothing is written.
    """
    state = examine(path)
    lines = [f"Megatron {state.version} in {state.root}: the patch was {state.word}"]
    files = {"apply": state.clean, "revert": state.applied, "check": {}}[action]
    if action == "check":
        lines[0] = lines[0].replace(" was ", " is ")
    write(state.root, files)
    for file, hunks in state.patch.items():
        places = f"{len(hunks)} place{'s' * (len(hunks) > 1)}"
        size = f"{sum(hunk.num_added for hunk in hunks)} lines in {places}"
        if action == "check":
            lines.append(f"  {file}: {size}, {'in place' if file in state.applied else 'not there'}")
        elif file in files:
            lines.append(f"  {file}: {'added' if action == 'apply' else 'removed'} {size}")
        else:
            lines.append(f"  {file}: already {'patched' if action == 'apply' else 'without the patch'}")
    tag = f"core_v{'.'.join(state.version.split('.')[:2])}.0"
    if not (state.root / "pretrain_gpt.py").is_file():
        lines.append(
            "  pretrain_gpt.py is not here, and in no wheel: run that of a checkout "
            f"(https://github.com/NVIDIA/Megatron-LM, tag {tag} or a later one of its series) with this folder first "
            "on PYTHONPATH"
        )
    return "\n".join(lines) + "\n", int(action == "check" and state.word != "applied")


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run the command.

    Raises:
        SystemExit: always, with the exit code.
    """
    parser = argparse.ArgumentParser(
        prog="python -m air_moe_megatron.patch", description=__doc__.partition("\n")[0].replace("``", "`")
    )
    parser.add_argument("action", choices=("apply", "check", "revert"))
    parser.add_argument("path", type=Path, metavar="PATH", help="a checkout, or the folder that holds `megatron`")
    args = parser.parse_args(argv)
    try:
        text, code = run(args.action, args.path.absolute())
    except UnknownTreeError as error:
        parser.exit(2, f"refused, nothing was changed: {error}\n")
    except SyntaxError as error:
        parser.exit(2, f"refused, nothing was changed: {error.filename}, line {error.lineno}: {error.msg}\n")
    except OSError as error:
        parser.exit(2, f"refused, nothing was changed: {error.filename}: {error.strerror}\n")
    sys.stdout.write(text)
    sys.exit(code)


if __name__ == "__main__":
    main()
