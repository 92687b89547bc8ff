"""Whether our code fits a Megatron, by parsing both sources: ``python -m air_moe_megatron.doctor --megatron PATH``.

Nothing of that tree is imported. Our own sources show what we use: names imported from Megatron, attributes of imported
modules and classes, calls of imported functions and classes, inherited attributes, overridden methods, and fields of
configs. ``compat.py`` lists what they do not show: ``WRAPPED`` and ``VERSIONED``. Not checked:
flags in ``args``, attributes of objects that Megatron's functions return, and what a function does with its arguments.
"""

import ast
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from packaging.version import Version

from air_moe_megatron.compat import VERSIONED, WRAPPED
from air_moe_megatron.cpu.adaptations import ADAPTATIONS
from air_moe_megatron.doctor.source_tree import Signature, Tree, members_of, signature_of
from air_moe_megatron.patch import find_root, version_of

PACKAGE = Path(__file__).parents[1]
_CONFIG = "megatron.core.transformer.transformer_config.TransformerConfig"
_OF_TORCH = frozenset(dir(torch.nn.Module())) | set(dir(torch.autograd.Function))
_MODEL = ("specs.py", "step_hooks.py", "sync.py")  # the files that patches/ call; all that they import is added


@dataclass(frozen=True)
class Mismatch:
    """One of our uses of Megatron that a tree does not support."""

    file: str
    line: int
    words: str

    @property
    def is_of_the_model(self) -> bool:
        """Whether layers, specs and the step boundary need it; otherwise only our commands do."""
        return self.file in model_files()


class Source:
    """One of our source files, and what its imported names refer to."""

    def __init__(self, path: Path) -> None:
        self.file = str(path.relative_to(PACKAGE))
        self.module = f"{PACKAGE.name}.{'.'.join(path.relative_to(PACKAGE).with_suffix('').parts)}"
        self.tree = ast.parse(path.read_text(encoding="utf-8"))
        self.imported: dict[str, str] = {}  # local name -> dotted name
        self.imports: list[tuple[int, str]] = []
        for node in ast.walk(self.tree):
            if isinstance(node, ast.ImportFrom) and node.module:
                for alias in node.names:
                    self.imported[alias.asname or alias.name] = f"{node.module}.{alias.name}"
                    if node.module.split(".")[0] == "megatron":
                        self.imports.append((alias.lineno, f"{node.module}.{alias.name}"))

    def dotted(self, node: ast.AST) -> str | None:
        """The full dotted name of an expression like ``a.b.c``; None unless it begins with an imported name."""
        first, *rest = ast.unparse(node).split(".") if isinstance(node, (ast.Name, ast.Attribute)) else [""]
        return ".".join([self.imported[first], *rest]) if first in self.imported else None


@functools.cache
def sources() -> dict[str, Source]:
    """Path within the package -> our source file."""
    return {one.file: one for one in map(Source, sorted(PACKAGE.rglob("*.py")))}


@functools.cache
def model_files() -> frozenset[str]:
    """The files of layers, specs and the step boundary, found by their imports."""
    own = _own_tree()
    found: set[str] = set()
    pending = list(_MODEL)
    while pending:
        file = pending.pop()
        if file in found:
            continue
        found.add(file)
        for dotted in sources()[file].imported.values():
            for name in (dotted, dotted.rpartition(".")[0]):
                path = own.file_of(name) if name.startswith(PACKAGE.name + ".") else None
                if path is not None and path.is_file():
                    pending.append(str(path.relative_to(PACKAGE)))
    return frozenset(found)


def find_mismatches(root: Path, version: str) -> list[Mismatch]:
    """All uses that the tree under a folder does not support, sorted by file and line."""
    tree, found = Tree(root), set()
    for source in sources().values():
        for line, words in (*_names(tree, source), *_classes(tree, source), *_configs(tree, source)):
            if not any(name in words and not _holds(bounds, version) for name, bounds in VERSIONED.items()):
                found.add(Mismatch(source.file, line, words))
    for adaptation in ADAPTATIONS:
        name = adaptation.name
        if name.startswith("megatron.") and not adaptation.optional and not _exists(tree, name):
            found.add(Mismatch("cpu/adaptations.py", 1, f"{name} does not exist"))
    for name, (expected, file) in WRAPPED.items():
        definition = tree.find(name)
        signature = definition and signature_of(tree, *definition)
        if signature is None:
            found.add(Mismatch(file, 1, f"{name}, which we wrap, does not exist"))
        elif not set(expected) <= signature.keywords:
            lacking = ", ".join(one for one in expected if one not in signature.keywords)
            found.add(Mismatch(file, 1, f"{name}, which we wrap, takes no {lacking}"))
    return sorted(found, key=lambda one: (one.file, one.line, one.words))


def _holds(bounds: tuple[str, str], version: str) -> bool:
    return Version(bounds[0]) <= Version(version) < Version(bounds[1])


def _exists(tree: Tree, dotted: str) -> bool:
    """Whether a name exists; attributes that every function has, such as its defaults, count as existing."""
    head, _, last = dotted.rpartition(".")
    return tree.find(dotted) is not None or (last.startswith("__") and tree.find(head) is not None)


def _names(tree: Tree, source: Source) -> Iterator[tuple[int, str]]:
    """Unsupported imports, attributes and calls: (line, what is wrong)."""
    for line, dotted in source.imports:
        if tree.find(dotted) is None:
            yield line, f"{dotted} does not exist"
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Attribute):
            dotted = source.dotted(node)
            owner = dotted and tree.find(dotted.rpartition(".")[0])
            if owner and dotted.startswith("megatron.") and isinstance(owner[1], (ast.ClassDef, type(None))):
                if not _exists(tree, dotted) and node.attr not in _OF_TORCH | {"__name__", "__members__"}:
                    yield node.lineno, f"{dotted} does not exist"
        if isinstance(node, ast.Call) and (dotted := source.dotted(node.func)) and dotted.startswith("megatron."):
            found = tree.find(dotted)
            signature = found and signature_of(tree, *found)
            refusal = signature and signature.refuses(node)
            if refusal:
                yield node.lineno, f"{dotted} {refusal}"


def _megatron_base(tree: Tree, source: Source, node: ast.ClassDef) -> Iterator[tuple[str, ast.ClassDef]]:
    """The classes of Megatron that one of ours inherits from, directly or through other classes of ours."""
    for base in node.bases:
        dotted = source.dotted(base) or f"{source.module}.{ast.unparse(base)}"
        if dotted.startswith("megatron."):
            found = tree.find(dotted)
            if found and isinstance(found[1], ast.ClassDef):
                yield found
        elif (ours := _our_class(dotted)) is not None:
            yield from _megatron_base(tree, *ours)


@functools.cache
def _own_tree() -> Tree:
    return Tree(PACKAGE.parent)


@functools.cache
def _our_fields() -> frozenset[str]:
    """The fields that our package adds to a config."""
    found = _own_tree().find(f"{PACKAGE.name}.config.fields.AIRFields")
    return frozenset(members_of(found[1]))


@functools.cache
def _our_class(dotted: str) -> tuple[Source, ast.ClassDef] | None:
    found = _own_tree().find(dotted)
    module, _, name = dotted.rpartition(".")
    if found is None and module:
        return None
    for source in sources().values():
        if source.module.removesuffix(".__init__") == (found[0] if found else module):
            for node in source.tree.body:
                if isinstance(node, ast.ClassDef) and node.name == name:
                    return source, node
    return None


def _all_ours(source: Source, node: ast.ClassDef) -> Iterator[ast.ClassDef]:
    yield node
    for base in node.bases:
        ours = _our_class(source.dotted(base) or f"{source.module}.{ast.unparse(base)}")
        if ours is not None:
            yield from _all_ours(*ours)


@functools.cache
def _family(source: Source, node: ast.ClassDef) -> list[ast.ClassDef]:
    """A class of ours, its bases and its subclasses among ours: it may use the attributes of all of them."""
    family = list(_all_ours(source, node))
    for other in sources().values():
        for one in (one for one in other.tree.body if isinstance(one, ast.ClassDef)):
            line = list(_all_ours(other, one))
            if node in line:
                family += line
    return family


def _classes(tree: Tree, source: Source) -> Iterator[tuple[int, str]]:
    """Unsupported inherited attributes, calls of ``super()`` and overridden methods: (line, what is wrong)."""
    for node in (one for one in source.tree.body if isinstance(one, ast.ClassDef)):
        bases = list(_megatron_base(tree, source, node))
        if not bases:
            continue
        above = set().union(*(members_of(one) for one in _all_ours(source, node) if one is not node))
        ours = set().union(*(members_of(one) for one in _family(source, node)))
        for one in ast.walk(node):
            if isinstance(one, ast.Attribute) and ast.unparse(one.value) in ("self", "super()"):
                is_missing = all(tree.member(*base, one.attr) is None for base in bases)
                is_ours = one.attr in (ours if ast.unparse(one.value) == "self" else above)
                if is_missing and not is_ours and one.attr not in _OF_TORCH:
                    yield one.lineno, f"{bases[0][0]}.{bases[0][1].name} has no {one.attr}"
            if isinstance(one, ast.Call) and isinstance(one.func, ast.Attribute):
                if ast.unparse(one.func.value) == "super()":
                    yield from _refused_super(tree, bases, one)
        for method in (one for one in node.body if isinstance(one, ast.FunctionDef)):
            yield from _override(tree, bases, node, method)


def _refused_super(tree: Tree, bases: list[tuple[str, ast.ClassDef]], call: ast.Call) -> Iterator[tuple[int, str]]:
    for module, base in bases:
        theirs = tree.member(module, base, call.func.attr)
        if isinstance(theirs, ast.FunctionDef):
            refusal = Signature.of(theirs, bound=True).refuses(call)
            if refusal:
                yield call.lineno, f"{module}.{base.name}.{call.func.attr} {refusal}"
            return


def _override(
    tree: Tree, bases: list[tuple[str, ast.ClassDef]], node: ast.ClassDef, method: ast.FunctionDef
) -> Iterator[tuple[int, str]]:
    for module, base in bases:
        theirs = tree.member(module, base, method.name)
        if not isinstance(theirs, ast.FunctionDef):
            continue
        expected, own = Signature.of(theirs, bound=True), Signature.of(method, bound=True)
        name = f"{module}.{base.name}.{method.name}"
        by_name = expected.keywords if method.name == "__init__" else expected.keywords - set(expected.positional)
        lacking = sorted(by_name - own.keywords)
        if lacking and not own.takes_any_keyword:
            yield method.lineno, f"{name} takes {', '.join(lacking)}, which {node.name} does not"
        elif len(own.positional) < len(expected.positional) and not own.takes_any_positional:
            more = ", ".join(expected.positional[len(own.positional) :])
            if not (method.name == "__init__" and own.takes_any_keyword):
                yield method.lineno, f"{name} takes {more} too, which {node.name} does not"
        return


def _configs(tree: Tree, source: Source) -> Iterator[tuple[int, str]]:
    """Missing fields of names annotated as Megatron's transformer config, and of ``self.config`` in layers."""
    found = tree.find(_CONFIG)
    if found is None or not isinstance(found[1], ast.ClassDef):
        return
    holders: list[tuple[ast.AST, str]] = []
    for node in ast.walk(source.tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            arguments = (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
            for arg in arguments:
                annotation = ast.unparse(arg.annotation) if arg.annotation else ""
                if annotation == "TransformerConfig":
                    holders.append((node, arg.arg))
        if isinstance(node, ast.ClassDef) and any(_megatron_base(tree, source, node)):
            holders.append((node, "self.config"))
    for holder, name in holders:
        for node in ast.walk(holder):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == name and node.attr not in _our_fields():
                if tree.member(*found, node.attr) is None:
                    yield node.lineno, f"TransformerConfig has no {node.attr}"


def report(path: Path) -> tuple[str, bool]:
    """Describe what of our code does not fit a Megatron, and say whether everything fits that supports its version.

    Args:
        path: a checkout, or the folder that holds the package ``megatron``.
    Raises:
        UnknownTreeError: if the path holds no Megatron.
    """
    from air_moe_megatron.compat import ENTRY_MEGATRON, SUPPORTED_MEGATRON, version_range

    root = find_root(path)
    version = version_of(root)
    found = find_mismatches(root, version)
    lines = [f"Megatron {version} in {root}"]
    fits = True
    parts = (
        ("Layers, specs and the step boundary", SUPPORTED_MEGATRON, [one for one in found if one.is_of_the_model]),
        ("Our commands", ENTRY_MEGATRON, [one for one in found if not one.is_of_the_model]),
    )
    for title, bounds, problems in parts:
        is_meant = _holds(bounds, version)
        if problems:
            lines.append(f"  {title}: {len(problems)} uses do not fit")
            lines += [f"    {PACKAGE.name}/{one.file}:{one.line}: {one.words}" for one in problems]
        else:
            lines.append(f"  {title}: every name and signature that we use is there")
        if not is_meant:
            lines.append(f"    (they are made for {version_range(bounds)})")
        fits &= not problems or (not is_meant and title == "Our commands" and _holds(SUPPORTED_MEGATRON, version))
    return "\n".join(lines) + "\n", fits
