"""The import direction, read off the sources, and the promise that importing the package does nothing."""

import ast
import sys
from pathlib import Path

import pytest

import air_moe_megatron
from tests.processes import run

PACKAGE = Path(air_moe_megatron.__file__).parent
NAME = PACKAGE.name

# A module may import from lower layers and from its own folder, if it is not listed there as unable to.
LAYERS = (
    {
        *("ops", "config", "compat", "patch", "process_groups", "modules", "expert_weights"),
        *("command", "command.console", "command.agreement", "command.indexed_dataset"),
    },
    {"learned", "cpu", "initialization", "command.schedule"},
    {"doctor", "doctor.machine", "doctor.source_tree", "routers", "command.start"},
    {"doctor.mismatches", "layer"},
    {"sync", "specs", "command.arguments", "diagnostics"},
    {"step_hooks", "command.memory", "command.model", "command.forward_step"},
    {"command.entry_refusals", "command.checkpoints"},
    {"training", "inference"},
    {"pretrain", "doctor.command"},
    {"convert", "evaluate", "generate", "plan", "report", "tune", "doctor.__main__"},
)
LEVEL = {module: level for level, modules in enumerate(LAYERS) for module in modules}
# The same within a folder, where the order of its files says more than the folder's place above.
WITHIN = {
    "learned": (
        {"centers", "module_state", "rebuild_schedule", "recomputation"},
        {"learner"},
        {"codebook", "expert_keys", "lists", "parts"},
        {"index", "running_norm"},
        {"whitening_norm"},
        {"low_rank_whitening_norm"},
        {"__init__"},
    ),
    "layer": ({"dispatcher", "experts"}, {"__init__"}),
    "routers/sharded": ({"exchange"}, {"pairs"}, {"candidates"}, {"router"}, {"__init__"}),
    "training": ({"datasets", "preflight"}, {"token_counts"}, {"run"}),
    "plan": ({"prediction"}, {"text"}, {"command"}, {"__init__", "__main__"}),
    "diagnostics": (
        {"splits", "two_stages", "files", "observation"},
        {"bounds", "recall", "health"},
        {"metrics", "watch"},
        {"snapshot"},
        {"__init__"},
    ),
}
# These import torch (and Triton) only, never Megatron.
TORCH_ONLY = ("ops", "learned")
SOURCES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def role_of(name):
    """What has a place in the layers: ``a.b`` where the files of folder ``a`` have different ones, otherwise ``a``."""
    parts = name.split(".")
    return ".".join(parts[:2]) if any(level.startswith(f"{parts[0]}.") for level in LEVEL) else parts[0]


def module_name(path):
    """The name within the package, without the ``__init__`` of a folder."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def folder_of(path):
    """The folder of a file within the package, such as ``routers/sharded``."""
    return path.parent.relative_to(PACKAGE).as_posix()


def imported_names(path, lazy_too=True):
    """Full names of the modules that a file imports; without those inside functions where ``lazy_too`` is False."""
    names = set()
    nodes = [ast.parse(path.read_text())]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) or lazy_too:
            nodes.extend(ast.iter_child_nodes(node))
    return names


def own_names(names):
    """The names within the package, of modules or of what is in them."""
    return {name.removeprefix(f"{NAME}.") for name in names if name.startswith(f"{NAME}.")}


def own_roles(names):
    return {role_of(name) for name in own_names(names)}


def idents(paths):
    return [str(path.relative_to(PACKAGE)) for path in paths]


def test_every_module_has_a_layer():
    assert {role_of(module_name(path)) for path in SOURCES} <= set(LEVEL)
    for folder, levels in WITHIN.items():
        assert {path.stem for path in (PACKAGE / folder).glob("*.py")} - {"__init__"} <= set().union(*levels)


@pytest.mark.parametrize("path", SOURCES, ids=idents(SOURCES))
def test_imports_point_down(path):
    role = role_of(module_name(path))
    for imported in own_roles(imported_names(path, lazy_too=False)) - {role}:
        assert LEVEL[imported] < LEVEL[role], f"{role} imports {imported}"


@pytest.mark.parametrize(
    "path", [path for path in SOURCES if folder_of(path) in WITHIN], ids=lambda path: f"{path.parent.name}-{path.stem}"
)
def test_imports_within_a_folder_point_down(path):
    folder = folder_of(path)
    level = {name: number for number, names in enumerate(WITHIN[folder]) for name in names}
    prefix = folder.replace("/", ".") + "."
    names = {name for name in own_names(imported_names(path, lazy_too=False)) if name.startswith(prefix)}
    for imported in {name.removeprefix(prefix).split(".")[0] for name in names} & set(level):
        assert level[imported] < level[path.stem], f"{folder}/{path.stem} imports {imported}"


def test_what_commands_share_imports_none_of_them():
    commands = set("pretrain training generate evaluate convert inference tune doctor plan report".split())
    for path in (PACKAGE / "command").rglob("*.py"):
        assert not {name.split(".")[0] for name in own_names(imported_names(path))} & commands, path


@pytest.mark.parametrize(
    "path", [path for path in SOURCES if role_of(module_name(path)) in TORCH_ONLY], ids=lambda path: path.stem
)
def test_ops_codebook_and_index_import_torch_only(path):
    allowed = {"torch", "triton", NAME} | set(sys.stdlib_module_names)
    assert {name.split(".")[0] for name in imported_names(path)} <= allowed
    assert own_roles(imported_names(path)) <= set(TORCH_ONLY)


@pytest.mark.parametrize("path", ["cpu/__init__.py", "cpu/adaptations.py"])
def test_cpu_mode_imports_of_ours_only_the_supported_versions(path):
    names = own_names(imported_names(PACKAGE / path))
    assert {name for name in names if role_of(name) != "cpu"} <= {"compat.SUPPORTED_MEGATRON", "compat.version_range"}


# Facts come before what judges them: a file of config/ imports only those listed.
CONFIG = {
    "fields": set(),
    "sizes": {"fields"},
    "hash_layers": {"fields", "sizes"},
    "problems": set(),
    "refusals": {"fields", "problems"},
    "rules": {"fields", "hash_layers", "problems", "sizes", "refusals"},
    "__init__": {"fields", "hash_layers", "problems", "sizes", "refusals", "rules"},
}


@pytest.mark.parametrize("path", sorted((PACKAGE / "config").glob("*.py")), ids=lambda path: path.stem)
def test_fields_and_sizes_of_config_do_not_import_what_validates(path):
    names = imported_names(path)
    assert own_roles(names) <= {"config"}
    assert {name.split(".")[2] for name in names if name.startswith(f"{NAME}.config.")} <= CONFIG[path.stem]


KERNELS = [path for path in SOURCES if "triton.jit" in path.read_text()]


def host_functions(path):
    """The functions of a file that are not Triton's."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef) and not any("jit" in ast.unparse(mark) for mark in node.decorator_list):
            yield node


@pytest.mark.parametrize("path", KERNELS, ids=idents(KERNELS))
def test_functions_beside_kernels_are_annotated(path):
    """Ruff leaves out whole files, and with them the functions that launch the kernels."""
    for node in host_functions(path):
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        bare = [argument.arg for argument in arguments if argument.annotation is None and argument.arg != "self"]
        assert node.returns is not None and not bare, f"{node.name}: {bare}"


def run_python(code):
    result = run([sys.executable, "-c", code], cwd=PACKAGE.parent)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_importing_the_package_loads_nothing_and_changes_nothing():
    run_python(
        "import os, sys\n"
        "environment, modules = dict(os.environ), set(sys.modules)\n"
        f"import {NAME}\n"
        "new = set(sys.modules) - modules\n"
        "heavy = {name for name in new if name.split('.')[0] in ('torch', 'megatron', 'triton', 'numpy')}\n"
        "assert not heavy, heavy\n"
        f"assert {{name for name in new if name.startswith('{NAME}')}} == {{'{NAME}'}}\n"
        "assert dict(os.environ) == environment\n"
    )


def test_ops_codebook_and_index_load_without_megatron():
    run_python(
        f"import sys\nsys.modules['megatron'] = None\n"
        f"import {NAME}.learned.codebook, {NAME}.learned.index, {NAME}.ops.fine_scores\n"
    )


def test_public_names_are_listed_and_load(megatron_cpu):
    for name in air_moe_megatron.__all__:
        assert getattr(air_moe_megatron, name) is not None
    assert set(air_moe_megatron.__all__) <= set(dir(air_moe_megatron))
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = air_moe_megatron.no_such_name
