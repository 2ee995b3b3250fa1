"""The code that a run's classes reach by imports, as hashes of its modules.

A module has two: of its bytes, which are quick to compare, and of its syntax tree without
docstrings, which tells an edit of the program from one of its layout, comments or documentation.
Imports are followed within our packages, within those of the classes themselves, and into whatever
else is not installed (site-packages, the standard library).
"""

import ast
import hashlib
import importlib.util
import sys
import sysconfig
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path

from runner.machine.memo import Memo

_OURS = {"kernels", "models", "runner"}
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
_DIGITS = 16
# (hash of the tree, imports) by "module bytes": to parse all modules takes a second.
_PARSED = Memo(f"code-{sys.version_info.major}.{sys.version_info.minor}")
_INSTALLED = {Path(path).resolve() for path in sysconfig.get_paths().values()}


def hashes(modules: Iterable[str]) -> dict[str, str]:
    """Return "bytes tree" by the name of each module that `modules` reach by imports, sorted.

    A module is read once a process: a fork server that called this when it started gives its
    children the code that they run, whatever has been edited since.
    """
    start = {module for module in modules if _file(module) is not None}
    tops = _OURS | {module.partition(".")[0] for module in start}
    found: dict[str, str] = {}
    waiting = list(start)
    while waiting:
        module = waiting.pop()
        if module not in found and _file(module) is not None:
            found[module], imported = _read(module)
            waiting += [name for name in imported if _is_followed(name, tops)]
    _PARSED.save()
    return dict(sorted(found.items()))


def changed(then: Mapping[str, str]) -> list[str]:
    """Return the modules of `then`, made by `hashes`, whose program is another today or gone."""
    names = [module for module, both in then.items() if not _is_same(module, both)]
    _PARSED.save()
    return names


def _is_same(module: str, both: str) -> bool:
    file = _file(module)
    if file is None or not file.exists():
        return False
    contents, _, tree = both.partition(" ")
    now = _of_bytes(file, file.stat().st_mtime_ns)
    return now == contents or _parsed(module, file, now)[0] == tree


@cache
def _read(module: str) -> tuple[str, Sequence[str]]:
    """Return ("bytes tree", names of the modules that `module` may import)."""
    file = _file(module)
    assert file is not None
    contents = _of_bytes(file, file.stat().st_mtime_ns)
    tree, imported = _parsed(module, file, contents)
    return f"{contents} {tree}", imported


def _parsed(module: str, file: Path, contents: str) -> tuple[str, Sequence[str]]:
    """Return (hash of the tree, names that may be imported) of a file with this hash of its bytes.

    A file that is no Python, as one half edited, has neither.
    """
    key = f"{module} {contents}"
    if key not in _PARSED.entries:
        try:
            tree = ast.parse(file.read_bytes(), str(file))
        except (SyntaxError, ValueError):
            return "", ()
        package = module if file.name == "__init__.py" else module.rpartition(".")[0]
        imported = {prefix for name in _imports(tree, package) for prefix in _prefixes(name)}
        _PARSED.entries[key] = _of_tree(tree), sorted(imported)
    of_tree, names = _PARSED.entries[key]
    return of_tree, names


def _imports(tree: ast.Module, package: str) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1]
            base = ".".join(
                [*(above if node.level else []), *([node.module] if node.module else [])]
            )
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


def _prefixes(name: str) -> Iterator[str]:
    parts = name.split(".")
    return (".".join(parts[:end]) for end in range(1, len(parts) + 1))


def _is_followed(module: str, tops: Collection[str]) -> bool:
    top = module.partition(".")[0]
    return top in tops or not _is_installed(top)


@cache
def _is_installed(top: str) -> bool:
    file = _file(top)
    return file is None or any(folder in _INSTALLED for folder in file.resolve().parents)


@cache
def _file(module: str) -> Path | None:
    """Return the source of `module` without importing it; None if it has none."""
    top, _, rest = module.partition(".")
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):  # ValueError: __main__, and modules made by hand
        return None
    if spec is None:
        return None
    if not rest:
        candidates = [Path(spec.origin)] if spec.origin else []
    else:
        below = [Path(folder, *rest.split(".")) for folder in spec.submodule_search_locations or ()]
        candidates = [file for path in below for file in (path / "__init__.py", _py(path))]
    return next((file for file in candidates if file.suffix == ".py" and file.is_file()), None)


def _py(path: Path) -> Path:
    return path.with_name(f"{path.name}.py")


@cache
def _of_bytes(file: Path, _changed_ns: int) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()[:_DIGITS]


def _of_tree(tree: ast.Module) -> str:
    for node in ast.walk(tree):
        if isinstance(node, _DOCUMENTED) and ast.get_docstring(node, clean=False) is not None:
            del node.body[0]
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()[:_DIGITS]
