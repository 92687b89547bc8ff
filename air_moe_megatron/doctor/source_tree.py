"""Look up Python sources by dotted names, and the signatures in them, without importing. Used by ``mismatches.py``."""

import ast
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


class Tree:
    """The sources of a package below a folder, looked up by dotted names."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @functools.cache  # noqa: B019
    def file_of(self, module: str) -> Path | None:
        """The file of a module; its folder if it has no file; None if it does not exist."""
        path = self.root / module.replace(".", "/")
        files = (path.with_suffix(".py"), path / "__init__.py", path)
        return next((file for file in files if file.exists()), None)

    @functools.cache  # noqa: B019
    def names(self, module: str) -> dict[str, ast.AST] | None:
        """What a module binds at its top level, branches included: name -> node; None if there is no such module."""
        file = self.file_of(module)
        found: dict[str, ast.AST] | None = None if file is None else {}
        if file is not None and file.is_file():
            _bind(ast.parse(file.read_text(encoding="utf-8")).body, found)
        return found

    @functools.cache  # noqa: B019
    def find(self, dotted: str) -> tuple[str, ast.AST | None] | None:
        """The module and node that define a dotted name, through imports; node None for a module; None if absent."""
        module, _, name = dotted.rpartition(".")
        if self.file_of(dotted) is not None:
            return dotted, None
        names = self.names(module) if module else None
        if not names or name not in names:
            if names is None and module and (parent := self.find(module)) and isinstance(parent[1], ast.ClassDef):
                member = self.member(parent[0], parent[1], name)
                return None if member is None else (parent[0], member)
            return None
        node = names[name]
        if isinstance(node, ast.ImportFrom):
            alias = next(one for one in node.names if (one.asname or one.name) == name)
            source = _absolute(module, node, self.file_of(module))
            return self.find(f"{source}.{alias.name}") if source.split(".")[0] == "megatron" else (module, node)
        return module, node

    def bases(self, module: str, node: ast.ClassDef) -> Iterator[tuple[str, ast.ClassDef]]:
        """A class and the classes that it inherits from, as far as they are in the tree."""
        yield module, node
        for base in node.bases:
            found = self.find(f"{module}.{ast.unparse(base).partition('[')[0]}")
            if found and isinstance(found[1], ast.ClassDef):
                yield from self.bases(*found)

    def member(self, module: str, node: ast.ClassDef, name: str) -> ast.AST | None:
        """The node that defines an attribute of a class: method or assignment, also to ``self``; None if absent."""
        return next((found for _, one in self.bases(module, node) if (found := members_of(one).get(name))), None)


def _bind(body: list[ast.stmt], found: dict[str, ast.AST]) -> None:
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            found[node.name] = node
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            found |= {(alias.asname or alias.name).split(".")[0]: node for alias in node.names}
        elif isinstance(node, (ast.Assign, ast.AnnAssign, ast.AugAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {name.id: node for one in targets for name in ast.walk(one) if isinstance(name, ast.Name)}
        for part in ("body", "orelse", "finalbody"):
            if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                inner: dict[str, ast.AST] = {}
                _bind(getattr(node, part, []), inner)
                for name, one in inner.items():  # a fallback after `except` does not hide what it replaces
                    found.setdefault(name, one)
        for handler in getattr(node, "handlers", []):
            inner = {}
            _bind(handler.body, inner)
            for name, one in inner.items():
                found.setdefault(name, one)


def _absolute(module: str, node: ast.ImportFrom, file: Path | None) -> str:
    if not node.level:
        return node.module or ""
    parts = module.split(".")
    is_package = file is not None and file.name == "__init__.py"
    parts = parts[: len(parts) - node.level + is_package]
    return ".".join([*parts, *([node.module] if node.module else [])])


@functools.cache
def members_of(node: ast.ClassDef) -> dict[str, ast.AST]:
    """Name -> node of all that a class defines, assigns to ``self``, or registers as a buffer or parameter."""
    found: dict[str, ast.AST] = {}
    _bind(node.body, found)
    for one in ast.walk(node):
        if isinstance(one, ast.Attribute) and isinstance(one.ctx, ast.Store) and ast.unparse(one.value) == "self":
            found.setdefault(one.attr, one)
        if isinstance(one, ast.Call) and ast.unparse(one.func).startswith(("self.register_", "self.add_")):
            if one.args and isinstance(one.args[0], ast.Constant):
                found.setdefault(one.args[0].value, one)
    return found


@dataclass(frozen=True)
class Signature:
    """The arguments that a function takes, without ``self``."""

    positional: tuple[str, ...]
    keywords: frozenset[str]
    required: frozenset[str]
    takes_any_positional: bool
    takes_any_keyword: bool

    @classmethod
    def of(cls, node: ast.FunctionDef, bound: bool) -> "Signature":
        """The signature of a function, or of a method called on an object (``bound``)."""
        args = node.args
        positional = [arg.arg for arg in (*args.posonlyargs, *args.args)]
        has_default = positional[len(positional) - len(args.defaults) :] if args.defaults else []
        marks = [ast.unparse(mark) for mark in node.decorator_list]
        has_self = "classmethod" in marks or (bound and "staticmethod" not in marks)
        positional = positional[1:] if has_self else positional
        keyword_only = [arg.arg for arg in args.kwonlyargs]
        needed = [arg.arg for arg, default in zip(args.kwonlyargs, args.kw_defaults, strict=True) if default is None]
        required = {name for name in positional if name not in has_default} | set(needed)
        return cls(
            tuple(positional),
            frozenset(positional) | frozenset(keyword_only),
            frozenset(required),
            args.vararg is not None,
            args.kwarg is not None,
        )

    def refuses(self, call: ast.Call) -> str | None:
        """Say which part of a call this signature does not accept; None if it accepts the call."""
        has_star = any(isinstance(arg, ast.Starred) for arg in call.args)
        given = [keyword.arg for keyword in call.keywords if keyword.arg]
        unknown = [name for name in given if name not in self.keywords]
        if unknown and not self.takes_any_keyword:
            return f"takes no {', '.join(unknown)}"
        if not has_star and len(call.args) > len(self.positional) and not self.takes_any_positional:
            return f"takes {len(self.positional)} positional arguments, {len(call.args)} are given"
        if not has_star and len(given) == len(call.keywords):
            lacking = self.required - set(self.positional[: len(call.args)]) - set(given)
            if lacking:
                return f"needs {', '.join(sorted(lacking))}"
        return None


def signature_of(tree: Tree, module: str, node: ast.AST | None) -> Signature | None:
    """The signature of a function, or of the construction of a class; None if it is not written out."""
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        return Signature.of(node, bound=False)
    if isinstance(node, ast.ClassDef):
        init = tree.member(module, node, "__init__")
        return Signature.of(init, bound=True) if isinstance(init, ast.FunctionDef) else None
    return None
