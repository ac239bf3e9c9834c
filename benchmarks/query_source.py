"""The code that a black-box attack's results hang on: what its module imports, and so on, without comments and docstrings."""

from __future__ import annotations

import ast
import hashlib
from functools import cache
from pathlib import Path

import epsball as eb
from epsball.attacks import entries

ROOT = Path(eb.__file__).parent
PARTS = ("core", "threats", "objectives", "attacks")
ASIDE = ("registry.py", "relaxed.py", "substitute.py", "average.py")  # strings, and victims other than a plain one


def digest(attack: str) -> str:
    """Changes with every change of code that the registered attack is made of."""
    files = sorted(closure(entries()[attack].recipe.__module__))
    return hashlib.sha256("".join(code(file) for file in files).encode()).hexdigest()[:12]


@cache
def code(file: Path) -> str:
    """What the file does, without its words."""
    tree = ast.parse(file.read_text(encoding="utf8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:]
    return ast.dump(tree)


def closure(module: str) -> set[Path]:
    """The files of a module and of all that it imports from the package's searching parts; of a package only the names wanted."""
    found: set[Path] = set()
    todo = [(module, "")]
    while todo:
        file = where(*todo.pop())
        if file not in found and file.relative_to(ROOT).parts[0] in PARTS and file.name not in ASIDE:
            found.add(file)
            todo += imports(file)
    return found


def where(module: str, name: str) -> Path:
    """The file that `from module import name` reads: where a package takes the name from, or the package's own."""
    path = ROOT.joinpath(*module.split(".")[1:])
    if not path.is_dir():
        return path.with_suffix(".py")
    if (path / f"{name}.py").exists():
        return path / f"{name}.py"
    named = {n: m for m, n in imports(path / "__init__.py")}
    return where(named[name], name) if name in named else path / "__init__.py"


@cache
def imports(file: Path) -> tuple[tuple[str, str], ...]:
    """(module, name) of every `from epsball... import name`."""
    nodes = [node for node in ast.walk(ast.parse(file.read_text(encoding="utf8"))) if isinstance(node, ast.ImportFrom)]
    return tuple((node.module, alias.name) for node in nodes if node.module and node.module.startswith("epsball") for alias in node.names)
