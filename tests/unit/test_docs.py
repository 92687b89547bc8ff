"""README and docs: snippets run, commands parse, links lead somewhere, and every flag is documented."""

import argparse
import dataclasses
import json
import os
import re
import shutil
import sys
from pathlib import Path

import pytest

from air_moe_megatron.config import AIRFields
from air_moe_megatron.doctor.command import own_parser
from tests.documents import README, ROOT, anchors, blocks, name_of, prose, section
from tests.processes import run

DOCUMENTS = [
    README,
    *sorted((ROOT / "docs").rglob("*.md")),
    ROOT / "patches/README.md",
    ROOT / "benchmarks/quality/README.md",
]
FLAG_ROW = re.compile(r"^\| `(--[a-z0-9-]+)` \| ([^|]+) \|", re.MULTILINE)
# The commands that documents may name. What is not here is not found, so no document can start anything else.
COMMANDS = ("bash", "cp", "docker", "git", "make", "pip", "python", "torchrun")
# Writes each command and its words to a file instead of running it.
STUB = r"""#!/bin/sh
printf '%s\037' "${0##*/}" "$@" >> "LOG"
printf '\036' >> "LOG"
"""
OF_THE_ENTRY = {"--air-moe": "off", "--cpu": "off", "--log-file": "None"}  # flags that are no fields of the config
CHECKED = {"air_moe_megatron.pretrain", "air_moe_megatron.doctor"}  # these take the flags of a training
OF_A_CHECKPOINT = "air_moe_megatron.convert"  # takes some, beside those that its checkpoint was trained with
NOT_OURS = {"pretrain_gpt.py"}  # scripts of a Megatron-LM checkout


def of_language(language: str) -> list[Path]:
    return [path for path in DOCUMENTS if any(block[0] == language for block in blocks(path))]


def documents(paths: list[Path]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("path", paths, ids=map(name_of, paths))


@documents(DOCUMENTS)
def test_code_stands_in_fenced_blocks_that_name_their_language(path):
    for language, line, _ in blocks(path):
        assert language in ("bash", "python", "text"), f"{name_of(path)}:{line}: {language!r}"
    assert not re.search(r"\n\n {4}\S", prose(path)), f"{name_of(path)}: an indented block"


# Python.


@documents(of_language("python"))
def test_python_blocks_run_one_after_another(path):
    runner = (
        "import json, sys\n"
        "name, blocks = json.load(sys.stdin)\n"
        "namespace = {'__name__': name}\n"
        "for line, code in blocks:\n"
        "    exec(compile('\\n' * line + code, name, 'exec'), namespace)\n"
    )
    parts = [(line, code) for language, line, code in blocks(path) if language == "python"]
    result = run([sys.executable, "-c", runner], cwd=ROOT, input=json.dumps((name_of(path), parts)))
    assert result.returncode == 0, result.stderr[-4000:]


def test_the_python_interface_is_documented():
    assert ROOT / "docs/python-api.md" in of_language("python")


# Commands.


@pytest.fixture(scope="module")
def parser(megatron_cpu) -> argparse.ArgumentParser:
    """Megatron's parser with our flags, as our entry makes it."""
    from megatron.training.arguments import add_megatron_arguments

    from air_moe_megatron.command.arguments import extra_args_provider

    return extra_args_provider(add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False)))


def write_stubs(folder: Path) -> Path:
    """Stand-ins for all commands, beside those of ``make install`` in .venv; returns the file that they write to."""
    log = folder / "commands"
    for place, names in (("stubs", COMMANDS), (".venv/bin", ("python", "pip", "torchrun"))):
        (folder / place).mkdir(parents=True)
        for name in names:
            script = folder / place / name
            script.write_text(STUB.replace("LOG", str(log)))
            script.chmod(0o755)
    return log


def commands_of(path: Path, folder: Path) -> list[list[str]]:
    """The commands that the bash blocks of a document start, as words; the blocks run in one shell."""
    log = write_stubs(folder)
    code = "cd() { :; }\n" + "".join(code for language, _, code in blocks(path) if language == "bash")
    result = run([shutil.which("bash"), "-eu", "-c", code], cwd=folder, env={"PATH": str(folder / "stubs")})
    assert result.returncode == 0, result.stderr
    return [record.split("\x1f")[:-1] for record in log.read_text().split("\x1e")[:-1]]


def flags_of(command: list[str]) -> list[str]:
    """What a command gives to Megatron's parser; nothing if it starts no training."""
    places = [
        place
        for place, word in enumerate(command)
        if word in CHECKED or word in NOT_OURS or word.startswith("examples/")
    ]
    return own_parser().parse_known_args(command[places[-1] + 1 :])[1] if places else []


@documents(of_language("bash"))
def test_commands_name_what_exists(path, tmp_path, parser):
    from air_moe_megatron.command.arguments import RECOMMENDED
    from air_moe_megatron.config import raise_first, unused

    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    commands = commands_of(path, tmp_path)
    assert commands
    for command in commands:
        if command[0] == "make":
            assert {word for word in command[1:] if "=" not in word} <= targets
        for word in command[1:]:
            if re.search(r"\.(py|sh|toml)$|/.*\.patch$", word) and word not in NOT_OURS:
                assert (ROOT / word.removeprefix(f"../{ROOT.name}/").removeprefix("../air_moe_megatron/")).exists(), (
                    word
                )
        flags = flags_of(command)
        assert flags or OF_A_CHECKPOINT in command or not any(word.startswith("--moe-") for word in command), command
        if flags:
            defaults = {name: parser.get_default(name) for name in RECOMMENDED}
            parser.set_defaults(**RECOMMENDED if "--air-moe" in flags else {})
            raise_first(unused(parser.parse_args(flags)))
            parser.set_defaults(**defaults)


def test_commands_that_use_a_checkpoint_parse(tmp_path, megatron_cpu):
    from megatron.training.arguments import add_megatron_arguments

    from air_moe_megatron import plan
    from air_moe_megatron.command.arguments import extra_args_provider
    from air_moe_megatron.inference import conversion, evaluation, generation
    from air_moe_megatron.tune import command as tuning

    modules = {"convert": conversion, "generate": generation, "evaluate": evaluation, "tune": tuning}
    found = set()
    commands = [
        one for name in ("inference", "tools") for one in commands_of(ROOT / f"docs/{name}.md", tmp_path / name)
    ]
    for command in commands:
        name = next(word for word in command if word.startswith("air_moe_megatron."))
        if name in CHECKED:
            continue
        if name == "air_moe_megatron.plan":
            assert plan.make_parser().parse_args(command[command.index(name) + 1 :]).experts
            continue
        parser = extra_args_provider(add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False)))
        modules[name.removeprefix("air_moe_megatron.")].add_flags(parser)
        assert parser.parse_args(command[command.index(name) + 1 :]).load
        found.add(name)
    assert len(found) == len(modules)


def test_the_readme_trains_air_on_cpu_and_gpu_with_the_same_flags(tmp_path):
    on_cpu, on_gpu = (set(flags) for flags in map(flags_of, commands_of(README, tmp_path)) if flags)
    assert on_cpu - on_gpu == {"--cpu"} and "--cpu" not in on_gpu
    assert "--air-moe" in on_cpu and not {flag for flag in on_cpu if flag.startswith("--moe-air")}


@pytest.mark.slow
def test_the_readme_trains_in_a_fresh_clone(tmp_path):
    data = tmp_path / "data/stdlib"
    assert run([sys.executable, ROOT / "examples/prepare_stdlib.py", "--out", data], cwd=ROOT).returncode == 0
    scripts = {"bin/make": ":", ".venv/bin/torchrun": f'exec "{sys.executable}" -m torch.distributed.run "$@"'}
    for name, command in scripts.items():
        script = tmp_path / name
        script.parent.mkdir(parents=True)
        script.write_text(f"#!/bin/sh\n{command}\n")
        script.chmod(0o755)
    (code,) = (code for language, _, code in blocks(README) if language == "bash" and "--cpu" in code)
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    result = run([shutil.which("bash"), "-eu", "-c", code], cwd=tmp_path, env=environment)
    assert result.returncode == 0, result.stderr[-4000:]
    assert "routing health at iteration       50 |" in result.stdout
    assert (tmp_path / "out/first/latest_checkpointed_iteration.txt").read_text().strip() == "50"


@documents(DOCUMENTS)
def test_every_moe_flag_in_the_text_exists(path, parser):
    known = {flag for action in parser._actions for flag in action.option_strings}
    assert set(re.findall(r"--moe-[a-z0-9-]*[a-z0-9]", path.read_text())) <= known


def test_every_flag_is_documented_with_its_default(parser):
    rows = dict(FLAG_ROW.findall((ROOT / "docs/routers.md").read_text()))
    defaults = {
        "--" + field.name.replace("_", "-"): "off" if field.default is False else str(field.default)
        for field in dataclasses.fields(AIRFields)
    } | OF_THE_ENTRY
    assert {flag: default.strip("`") for flag, default in rows.items()} == defaults
    chosen = dict(FLAG_ROW.findall(section(README, "Flags")))
    assert len(chosen) == 10 and chosen.items() <= rows.items()
    own = next(group for group in parser._action_groups if group.title == "air_moe_megatron")
    assert {action.option_strings[0] for action in own._group_actions} == set(OF_THE_ENTRY)


# Links, tree, health line.


@documents(DOCUMENTS)
def test_relative_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(path)):
        if re.match(r"https?:", target):
            continue
        file, _, anchor = target.partition("#")
        linked = (path.parent / file).resolve() if file else path
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked), target


def test_every_document_can_be_reached_from_the_readme():
    seen, found = set(), [README]
    while found:
        path = found.pop()
        if path in seen or path.suffix != ".md":
            continue
        seen.add(path)
        targets = (target.partition("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", prose(path)))
        found += [linked for target in targets if target and (linked := (path.parent / target).resolve()).is_file()]
    assert {name_of(path) for path in DOCUMENTS} <= {name_of(path) for path in seen}


def test_the_tests_that_documents_name_exist():
    for path in DOCUMENTS:
        for named in re.findall(r"`(tests/[\w./]+\.py)`", prose(path)):
            assert (ROOT / named).is_file(), f"{path}: {named}"


def test_what_the_tree_names_exists():
    (tree,) = (code for language, _, code in blocks(README) if language == "text" and "\n  " in code)
    folders: list[str] = []
    for line in tree.splitlines():
        name, depth = line.split()[0], (len(line) - len(line.lstrip())) // 2
        folders[depth:] = [name]
        path = ROOT.joinpath(*folders)
        assert path.is_dir() if name.endswith("/") else path.is_file(), name
        assert len(line.split()) > 1 or depth == 0, f"{name}: no word on what it is"


def test_the_figures_of_the_health_line_are_those_documented():
    from air_moe_megatron.diagnostics.health import ITEMS, health_line

    table = (ROOT / "docs/health.md").read_text().partition("\n## ")[0]
    keys = dict(re.findall(r"^\| `([^`]+)` \| `([^`]+)` \|", table, re.MULTILINE))
    assert keys.pop("to other ranks") == "remote-bytes-per-token"  # in the item before it
    assert keys == {item.label: item.key for item in ITEMS}

    def labels(line):
        parts = [part.strip() for part in line.strip().rstrip("|").split(" | ")[1:]]
        inner = re.findall(r"[\d.]+ ([a-z][a-z ]+)[,)]", line)
        return {part.split(":")[0] for part in parts} | set(inner)

    figures = dict.fromkeys([*(item.key for item in ITEMS), "remote-bytes-per-token"], 1.0)
    every = labels(health_line(figures, {"num_experts": "64", "num_clusters": "32"}, 7))
    documented = re.findall(
        r"^\| `([^`]+)` \|", (ROOT / "docs/health.md").read_text().partition("\n## ")[0], re.MULTILINE
    )
    assert len(every) >= 10 and set(documented) == every
    (example,) = (code for language, _, code in blocks(README) if "routing health at iteration" in code)
    assert labels(example) <= every
