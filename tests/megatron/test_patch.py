"""Our entry against a script that knows nothing of us, on Megatron as installed and on a patched copy of it."""

import ast
import dataclasses
import importlib.util
import os
import re
import shutil
import typing
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from air_moe_megatron import cpu
from air_moe_megatron.config import AIRFields
from tests.megatron.conftest import AIR, EP2, ROOT, read_checkpoint, read_diagnostics, untimed
from tests.processes import run

pytestmark = pytest.mark.slow

PLAIN = ["-m", "air_moe_megatron.cpu", "tests/megatron/plain_gpt.py", *cpu.REQUIRED_FLAGS]
TRAIN = [*EP2, "--train-iters", "4", "--eval-interval", "2"]


@pytest.fixture(scope="module")
def patched(tmp_path_factory) -> Path:
    """A copy of the installed Megatron with the patch applied: the folder to put on PYTHONPATH."""
    folder = tmp_path_factory.mktemp("checkout")
    package = Path(importlib.util.find_spec("megatron.core").submodule_search_locations[0]).parent
    shutil.copytree(package, folder / "megatron", ignore=shutil.ignore_patterns("__pycache__"))
    patch = ROOT / "patches" / "core_v0.19.0.patch"
    run(["git", "apply", "--check", patch], cwd=folder, check=True)
    run(["git", "apply", patch], cwd=folder, check=True)
    return folder


def on(checkout: Path) -> dict[str, str]:
    return {"PYTHONPATH": os.pathsep.join([str(checkout), str(ROOT)])}


def evaluations(run):
    """Loss and perplexity of each; a warning may follow on the same line."""
    return re.findall(r"validation loss at iteration.*?lm loss value: (\S+) \| lm loss PPL: (\S+)", run.output)


def test_topk_is_megatron_bit_for_bit(pretrain, tmp_path):
    plain = pretrain(*TRAIN, "--save", tmp_path / "plain", "--save-interval", 4, entry=PLAIN)
    ours = pretrain(*TRAIN, "--save", tmp_path / "ours", "--save-interval", 4)
    assert len(plain.steps) == 4
    assert ours.steps == plain.steps
    assert ours.output.count("validation loss") == plain.output.count("validation loss") > 2
    assert evaluations(ours) == evaluations(plain)
    expected, found = (read_checkpoint(tmp_path / name, 4) for name in ("plain", "ours"))
    assert expected.keys() == found.keys()
    assert [key for key in expected if not expected[key].equal(found[key])] == []


def test_patched_checkout_honors_the_flag(pretrain, patched, tmp_path):
    air = [*AIR, "--moe-air-diagnostics-interval", "3"]
    by_flag = pretrain(*TRAIN, *air, "--tensorboard-dir", tmp_path / "by_flag", entry=PLAIN, env=on(patched))
    ours = pretrain(*TRAIN, *air, "--tensorboard-dir", tmp_path / "ours")
    assert len(by_flag.steps) == 4
    assert by_flag.steps == ours.steps
    assert "routing health at iteration" in by_flag.output
    found, expected = ([untimed(line) for line in read_diagnostics(tmp_path / name)] for name in ("by_flag", "ours"))
    assert [line["kind"] for line in found] == ["run", *["step"] * 3, "diagnostics", "step", "diagnostics"]
    assert found[1:] == expected[1:]
    assert found[0]["layers"] == expected[0]["layers"]
    for name in ("by_flag", "ours"):
        scalars = EventAccumulator(str(tmp_path / name)).Reload()
        for line in (line for line in expected if line["kind"] == "diagnostics"):
            for layer in line["layers"]:
                for figure in ("mass_recall", "certified", "experts_used"):
                    logged = scalars.Scalars(f"air/layer_{layer['layer']}/{figure.replace('_', '-')}")
                    assert {one.step: one.value for one in logged}[line["iteration"]] == pytest.approx(layer[figure])
        assert [one.step for one in scalars.Scalars("air/routing-share")] == [3, 4]


@pytest.mark.long
def test_our_entry_trains_the_same_on_a_patched_checkout(pretrain, patched):
    flags = [*TRAIN, *AIR, "--moe-num-hash-layers", "1"]
    ours, on_patched = pretrain(*flags), pretrain(*flags, env=on(patched))
    assert len(ours.steps) == 4
    assert on_patched.steps == ours.steps


def test_patched_checkout_behaves_as_before_without_the_flag(pretrain, patched):
    assert pretrain(*TRAIN, entry=PLAIN, env=on(patched)).steps == pretrain(*TRAIN, entry=PLAIN).steps


def test_fields_of_the_patch_are_ours(patched):
    source = (patched / "megatron/core/transformer/transformer_config.py").read_text()
    types = typing.get_type_hints(AIRFields)
    for field in dataclasses.fields(AIRFields):
        lines = [line for line in source.splitlines() if line.startswith(f"    {field.name}: ")]
        assert len(lines) == 1, (field.name, lines)
        annotation, default = lines[0].removeprefix(f"    {field.name}: ").split(" = ")
        assert eval(annotation, vars(typing).copy()) == types[field.name], lines  # noqa: S307
        assert ast.literal_eval(default) == field.default, lines
