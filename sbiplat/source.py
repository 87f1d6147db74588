"""The digest of a simulator's code: what tells a bank that its simulator has changed.

The source is read as a syntax tree. From the function on, every name is followed to the module-level statements that
bind it, in its own file and in its neighbours, until nothing new is found; what is found is hashed in a normal form.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import textwrap
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import CodeType
from typing import Any

import numpy as np

from sbiplat import files


def source_digest(function: Callable[..., Any]) -> str:
    """SHA-256 of the code that decides what a function returns, and of the values that it carries.

    Counted: the function (or class), and every module-level name that it uses, transitively, in its own file and in the
    modules that it imports from beside it or from its own package (whole ones after `import helpers`); the arguments of
    a partial, what a closure holds, the attributes of a callable object. Not counted: comments, docstrings, code that it
    does not use, other packages (bank.json has their versions), and what is in the data files that it reads: give a bank
    of changed data another --out.
    """
    return hashlib.sha256(_described(function, {}).encode()).hexdigest()


@functools.cache
def code_digest() -> str:
    """SHA-256 of sbiplat's own code, as it is installed here: of the canonical JSON of {path within the package: SHA-256 of the file},
    over all its .py files, with line ends as LF."""
    home = Path(__file__).parent
    return files.digest_of({p.relative_to(home).as_posix(): files.digest_bytes(p.read_bytes().replace(b"\r\n", b"\n"))
                            for p in home.rglob("*.py")})


def _described(value: Any, seen: dict[int, Any]) -> str:
    """A text that is the same in every process for the same function or value; what was seen before is not told again."""
    if value is None or isinstance(value, bool | int | float | complex | str | bytes | np.generic):
        return repr(value)
    if isinstance(value, tuple):
        return f"({', '.join(_described(v, seen) for v in value)})"
    if isinstance(value, np.ndarray) and value.dtype != object:
        return f"array {value.dtype} {value.shape} {hashlib.sha256(np.ascontiguousarray(value).data).hexdigest()}"
    if id(value) in seen:
        return f"again {list(seen).index(id(value))}"
    seen[id(value)] = value
    if isinstance(value, list):
        return _described(tuple(value), seen)
    if isinstance(value, Mapping):
        return _described(tuple(value.items()), seen)
    if isinstance(value, set | frozenset):
        return f"set {sorted(_described(v, seen) for v in value)}"
    if hasattr(value, "source_parts") and not inspect.isclass(value):  # it says itself what decides
        return _described(value.source_parts(), seen)
    if isinstance(value, functools.partial):
        return f"partial {_described((value.func, value.args, value.keywords), seen)}"
    if inspect.ismethod(value):
        return f"method {_described((value.__func__, value.__self__), seen)}"
    if inspect.isclass(value) or inspect.isfunction(value):
        return _relevant_source(inspect.unwrap(value), seen)
    if inspect.ismodule(value) or inspect.isbuiltin(value) or not hasattr(value, "__dict__"):
        return getattr(value, "__name__", type(value).__name__)
    return f"{_described(type(value), seen)} {_described(sorted(vars(value).items()), seen)}"


def _relevant_source(own: Callable[..., Any], seen: dict[int, Any]) -> str:
    """The function or class, what its closure holds, and all that it uses from its own modules, as normalised source."""
    nonlocals = inspect.getclosurevars(own).nonlocals if inspect.isfunction(own) else {}
    held = _described(sorted(nonlocals.items()), seen) if nonlocals else ""
    try:
        home = _Module.of(own)
        first = ast.parse(textwrap.dedent(inspect.getsource(own))).body[0]
    except (OSError, TypeError, AttributeError, SyntaxError, IndexError):  # no file: its code, and the globals that it uses
        return f"{_code_text(own, seen)} {held}"
    if hasattr(first, "decorator_list"):
        first.decorator_list = [d for d in first.decorator_list if "simulator" not in ast.unparse(d).split("(")[0]]
    statements = [(home, first)]
    known = {id(s) for s in home.table.get(own.__name__, []) if getattr(s, "name", "") == own.__name__}
    for module, statement in statements:  # grows while it is walked
        for found in module.used_by(statement):
            if id(found[1]) not in known:
                known.add(id(found[1]))
                statements.append(found)
    texts = [ast.unparse(_without_docstrings(s)) for _, s in statements]
    return "\n".join([texts[0], *sorted(texts[1:]), held])


def _code_text(own: Callable[..., Any], seen: dict[int, Any]) -> str:
    """The byte code of a function, with that of the functions inside it, and the values of the globals that they use."""
    if not inspect.isfunction(own):
        return f"{own.__module__}.{own.__qualname__}"
    codes = [own.__code__]
    for code in codes:  # grows while it is walked
        codes.extend(c for c in code.co_consts if isinstance(c, CodeType))
    texts = [(c.co_code, c.co_names, [k for k in c.co_consts if not isinstance(k, CodeType)]) for c in codes]
    used = {name: own.__globals__[name] for c in codes for name in c.co_names if name in own.__globals__}
    others = sorted((k, v) for k, v in used.items() if getattr(v, "function", v) is not own)
    return f"{texts} {_described(others, seen)}"


class _Module:
    """A source file as a table: module-level name -> the statements that bind or change it, in branches too.

    `root` is the folder in which absolute imports are looked for; only those of the package `top`, where it has one.
    """

    def __init__(self, text: str, folder: Path, root: Path, top: str) -> None:
        self.folder, self.root, self.top = folder, root, top
        self.table: dict[str, list[ast.stmt]] = {}
        body = [part for statement in ast.parse(text).body for part in _one_by_one(statement)]
        imported = {name for s in body if isinstance(s, ast.Import | ast.ImportFrom) for name in _bound(s)}
        for statement in body:
            for name in set(_bound(statement)) - (imported if isinstance(statement, ast.Expr) else set()):
                self.table.setdefault(name, []).append(statement)

    @staticmethod
    def of(own: Callable[..., Any]) -> _Module:
        module = inspect.getmodule(own)
        package = module.__package__.split(".") if module.__package__ else []
        folder = Path(inspect.getfile(module)).resolve().parent
        root, top = [folder, *folder.parents][len(package)], package[0] if package else ""
        return _Module(inspect.getsource(module), folder, root, top)

    def used_by(self, statement: ast.stmt) -> Iterator[tuple[_Module, ast.stmt]]:
        """The module-level statements, here and in neighbours that it imports, that a statement uses."""
        for node in ast.walk(statement):
            if isinstance(node, ast.Name):
                yield from ((self, s) for s in self.table.get(node.id, []))
            elif isinstance(node, ast.Import):
                for alias in node.names:
                    yield from self._neighbour(alias.name.split("."))
            elif isinstance(node, ast.ImportFrom):
                path = node.module.split(".") if node.module else []
                for alias in node.names:
                    yield from self._neighbour(path, node.level, alias.name)
                    yield from self._neighbour([*path, alias.name], node.level)

    def _neighbour(self, path: list[str], level: int = 0, name: str = "*") -> Iterator[tuple[_Module, ast.stmt]]:
        """The statements behind a name of the module `path` (all behind "*"), where that is a neighbour's file."""
        if not level and (path[:1] == ["sbiplat"] or (self.top and path[:1] != [self.top])):
            return
        stem = ([self.folder, *self.folder.parents][level - 1] if level else self.root).joinpath(*path)
        for file in (stem.parent / f"{stem.name}.py", stem / "__init__.py"):
            if path and file.is_file():
                there = _read_module(file, self.root, self.top)
                names = list(there.table) if name == "*" else [name]
                yield from ((there, s) for n in names for s in there.table.get(n, []))


@functools.cache
def _read_module(file: Path, root: Path, top: str) -> _Module:
    return _Module(file.read_text(encoding="utf-8"), file.parent, root, top)


def _one_by_one(statement: ast.stmt) -> list[ast.stmt]:
    """An import of several names as several imports; anything else as it is."""
    if isinstance(statement, ast.ImportFrom):
        return [ast.ImportFrom(statement.module, [alias], statement.level) for alias in statement.names]
    if isinstance(statement, ast.Import):
        return [ast.Import([alias]) for alias in statement.names]
    return [statement]


def _bound(node: ast.AST) -> Iterator[str]:
    """Module-level names that a statement binds or changes (x = .., x[0] = .., x.update(..)), in its branches too."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        yield node.name
        return
    if isinstance(node, ast.Lambda) or (isinstance(node, ast.If) and "__name__" in ast.unparse(node.test)):
        return
    if isinstance(node, ast.alias):
        yield (node.asname or node.name).split(".")[0]
    changed = node.value.func if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) else node
    if changed is not node or isinstance(getattr(node, "ctx", None), ast.Store):
        while isinstance(changed, ast.Attribute | ast.Subscript):
            changed = changed.value
        if isinstance(changed, ast.Name):
            yield changed.id
    for child in ast.iter_child_nodes(node):
        yield from _bound(child)


def _without_docstrings(tree: ast.stmt) -> ast.stmt:
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant) \
                and isinstance(body[0].value.value, str):
            node.body = body[1:] or [ast.Pass()]
    return tree
