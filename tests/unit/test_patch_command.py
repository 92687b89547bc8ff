"""`python -m air_moe_megatron.patch` on trees that it knows and on those that it does not."""

import importlib.util
import os
import re
import runpy
import shutil
import stat
import sys
from pathlib import Path

import pytest

from air_moe_megatron import patch
from air_moe_megatron.patch import UnknownTreeError, available, examine, parse_patch, run
from tests.processes import run as run_process

ROOT = Path(__file__).parents[2]
VERSIONS = ("0.17.1", "0.18.2", "0.19.2")
TRAINING = "megatron/training/training.py"
CONFIG = "megatron/core/transformer/transformer_config.py"


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """A copy of the files of the installed wheel that the patch touches."""
    folder = tmp_path_factory.mktemp("wheel")
    site = Path(importlib.util.find_spec("megatron.core").submodule_search_locations[0]).parents[1]
    for file in ("megatron/core/package_info.py", *parse_patch(available()["0.19"].read_text())):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(site / file, folder / file)
    return folder


@pytest.fixture
def copy(wheel, tmp_path) -> Path:
    return shutil.copytree(wheel, tmp_path / "copy")


def edit(path, old, new):
    text = path.read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))


def test_apply_check_and_revert_can_be_repeated_and_undo_each_other(copy):
    original = contents(copy)
    assert run("check", copy)[1] == 1 and contents(copy) == original
    said, code = run("apply", copy)
    assert code == 0 and "the patch was not applied" in said
    assert all(f"{file}: added" in said for file in parse_patch(available()["0.19"].read_text()))
    assert "pretrain_gpt.py is not here, and in no wheel" in said
    patched = contents(copy)
    assert patched.keys() == original.keys() and sum(patched[file] != original[file] for file in patched) == 3
    said, code = run("apply", copy)
    assert code == 0 and said.count("already patched") == 3 and contents(copy) == patched
    assert run("check", copy)[1] == 0
    assert run("revert", copy)[1] == 0 and contents(copy) == original
    said, code = run("revert", copy)
    assert code == 0 and said.count("already without the patch") == 3 and contents(copy) == original


def test_it_does_what_git_apply_does(copy, wheel, tmp_path):
    other = shutil.copytree(wheel, tmp_path / "other")
    environment = {**os.environ, "GIT_CEILING_DIRECTORIES": str(tmp_path.parent)}
    run_process(["git", "apply", available()["0.19"]], cwd=other, env=environment, check=True)
    run("apply", copy)
    assert contents(copy) == contents(other)


def test_the_command_works_on_the_package_inside_a_repository_that_ignores_it(copy):
    """There `git apply` passes over every file and reports success."""
    run_process(["git", "init", "-q", copy], check=True)
    (copy / ".gitignore").write_text("megatron\n")
    command = [sys.executable, "-m", "air_moe_megatron.patch"]
    said = run_process([*command, "apply", copy / "megatron"], cwd=ROOT)
    assert said.returncode == 0 and re.search(r"added \d+ lines in 3 places", said.stdout), said.stderr
    assert run_process([*command, "check", copy], cwd=ROOT).returncode == 0
    edit(copy / "megatron/core/package_info.py", "MINOR = 19", "MINOR = 20")
    refused = run_process([*command, "revert", copy], cwd=ROOT)
    assert refused.returncode == 2 and "package_info.py is of Megatron 0.20." in refused.stderr


def test_edits_elsewhere_and_modes_are_kept(copy):
    path = copy / TRAINING
    path.chmod(0o640)
    path.write_text("# mine\n" + path.read_text() + "\n# mine too\n")
    original = contents(copy)
    run("apply", copy)
    assert path.read_text().startswith("# mine\n") and path.read_text().endswith("# mine too\n")
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    run("revert", copy)
    assert contents(copy) == original


def test_a_file_without_the_patch_beside_patched_ones_is_completed(copy, wheel):
    run("apply", copy)
    patched = contents(copy)
    shutil.copy(wheel / CONFIG, copy / CONFIG)
    said, code = run("check", copy)
    assert code == 1 and "is half applied" in said and re.search(rf"{CONFIG}: \d+ lines in 1 place, not there", said)
    run("apply", copy)
    assert contents(copy) == patched


@pytest.mark.parametrize(
    ("file", "old", "new", "words"),
    [
        (TRAINING, "        optimizer.zero_grad()\n", "        optimizer.zero_grad(True)\n", "found 0 times"),
        (CONFIG, '    """Number of experts to route to for each token."""\n', "    # here\n", "found 0 times"),
    ],
)
def test_a_local_edit_where_the_patch_goes_is_refused(copy, file, old, new, words):
    edit(copy / file, old, new)
    edited = contents(copy)
    for action in ("apply", "check", "revert"):
        with pytest.raises(UnknownTreeError, match=f"{file} .*{words}"):
            run(action, copy)
    assert contents(copy) == edited


def test_a_file_that_is_no_python_or_no_text_is_refused_by_name(copy, capsys):
    info = copy / "megatron/core/package_info.py"
    with open(copy / TRAINING, "a") as file:
        file.write("def (\n")
    before = info.read_bytes()
    for content, action, words in (
        (before, "apply", f"{TRAINING}, line "),
        (b"MAJOR = (\n", "check", f"{info}, line 1: "),
        (b"\xff\xfe", "check", f"{info} is not UTF-8"),
    ):
        info.write_bytes(content)
        unchanged = contents(copy)
        with pytest.raises(SystemExit) as stopped:
            patch.main([action, str(copy)])
        assert stopped.value.code == 2 and contents(copy) == unchanged
        assert f"refused, nothing was changed: {words}" in capsys.readouterr().err


def test_an_edit_of_our_own_lines_is_refused(copy):
    run("apply", copy)
    edit(copy / CONFIG, "moe_air_refresh_interval: int = 20", "moe_air_refresh_interval: int = 40")
    with pytest.raises(UnknownTreeError, match=f"{CONFIG} .*holds another version of this patch"):
        run("revert", copy)


def test_a_file_that_is_patched_in_part_is_refused(copy):
    run("apply", copy)
    edit(copy / TRAINING, "            from air_moe_megatron.sync import discard_statistics\n", "")
    with pytest.raises(UnknownTreeError, match=f"{TRAINING} .*place 1 of 3: the patch is there in part"):
        run("apply", copy)


def test_other_trees_are_refused_by_the_name_of_a_file(copy, tmp_path):
    with pytest.raises(UnknownTreeError, match=r"megatron/core/package_info.py does not exist"):
        run("apply", tmp_path)
    (copy / TRAINING).unlink()
    with pytest.raises(UnknownTreeError, match=f"{TRAINING} does not exist"):
        run("apply", copy)
    (copy / "megatron/core/package_info.py").write_text("VERSION = 1\n")
    with pytest.raises(UnknownTreeError, match="package_info.py states no version: 'MAJOR' is missing"):
        run("apply", copy)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("end", ["\n", "\r\n"], ids=["unix", "windows"])
def test_every_version_has_a_patch_that_can_be_undone(version, end, tmp_path):
    files = parse_patch(available()[version.rpartition(".")[0]].read_text())
    assert sum(hunk.num_added for hunks in files.values() for hunk in hunks) > 70
    for file, hunks in files.items():
        text = end.join("elsewhere\n".join(hunk.before for hunk in hunks).split("\n"))
        changes = [(hunk.before, hunk.after) for hunk in hunks]
        patched = patch._replace(text, changes)
        assert patched.count(end) == patched.count("\n") == text.count("\n") + sum(h.num_added for h in hunks)
        assert all(patch._count(patched, hunk.after) == 1 and not patch._count(patched, hunk.before) for hunk in hunks)
        assert patch._replace(patched, [(new, old) for old, new in changes]) == text, file


def test_a_failed_write_leaves_every_file_as_it_was(copy, monkeypatch):
    original, replace = contents(copy), os.replace
    calls = []

    def fail_at_the_second(source, target):
        calls.append(target)
        if len(calls) == 2:
            raise OSError(28, "No space left on device", str(target))
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail_at_the_second)
    with pytest.raises(OSError, match="No space left"):
        run("apply", copy)
    assert contents(copy) == original


def test_the_other_patches_are_derived_from_that_of_0_19():
    module = runpy.run_path(str(ROOT / "patches/derive.py"))
    source = module["SOURCE"].read_text()
    for tag in module["STARTS"]:
        assert (ROOT / f"patches/{tag}.patch").read_text() == module["derive"](source, tag), "run `make patches`"
    assert {*available()} == {"0.17", "0.18", "0.19"}


def test_a_new_line_in_the_patch_of_0_19_reaches_the_others():
    module = runpy.run_path(str(ROOT / "patches/derive.py"))
    new = '+    moe_new: int = 0\n+    """New."""\n+\n'
    source = module["SOURCE"].read_text()
    place = "+    moe_router_input_norm:"
    (size,) = re.findall(r"@@ -740,4 \+740,(\d+) @@", source)
    longer = source.replace(place, new + place).replace(f"+740,{size} @@", f"+740,{int(size) + 3} @@")
    for tag, starts in module["STARTS"].items():
        files = parse_patch(module["derive"](longer, tag))
        assert "    moe_new: int = 0\n" in files[CONFIG][0].after
        (start,) = starts["transformer_config.py"]
        assert f"@@ -{start},4 +{start},{int(size) + 3} @@" in module["derive"](longer, tag)


def test_the_state_of_a_tree_is_read_without_importing_it(copy):
    before = set(sys.modules)
    assert examine(copy).word == "not applied"
    assert not {name for name in set(sys.modules) - before if name.startswith("megatron")}
