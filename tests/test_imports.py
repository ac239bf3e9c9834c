"""The house rules that a reader cannot check by eye: who imports whom, what nobody may call, how long files are."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import epsball
from epsball.attacks import entries

SRC = Path(epsball.__file__).parent
FILES = sorted(SRC.rglob("*.py"))
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in FILES}

BASE = {"errors"}
ATTACK_SIDE = BASE | {"core", "threats", "objectives"}
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "core": BASE | {"core"},
    "threats": BASE | {"core", "threats"},
    "objectives": BASE | {"core", "objectives"},
    "attacks": ATTACK_SIDE | {"attacks"},
    "store": BASE | {"store"},
    "report": BASE | {"report", "auditing.results"},
    "data": BASE | {"data"},
    "models": BASE | {"core", "models", "data"},  # both are adapters at the edge: files and boxes are checked alike
    "auditing": ATTACK_SIDE | {"attacks", "auditing", "certify", "store"},
    "defenses": ATTACK_SIDE | {"attacks", "certify", "models", "data", "defenses"},
    "corruptions": BASE | {"corruptions"},
    "certify": BASE | {"core", "threats", "models", "certify"},
    "explain": ATTACK_SIDE | {"explain"},
    "reproduce": ATTACK_SIDE
    | {"attacks", "data", "models", "reproduce", "auditing.statistics", "defenses.training"}
    | {"report.svg", "report.text", "report.files"}  # charts, words and the atomic writer
    | {"door", "auditing.results"},  # trained networks are audited as anybody would
}
OUTSIDE: dict[str, set[str]] = {
    "core": {"torch", "numpy"},
    "threats": {"torch", "numpy"},
    "objectives": {"torch", "numpy"},
    "errors": set(),
}
NO_TORCH = ("report", "store", "errors")


def part_of(path: Path) -> str:
    """`src/epsball/core/run.py` -> `core`; `src/epsball/errors.py` -> `errors`."""
    first = path.relative_to(SRC).parts[0]
    return first.removesuffix(".py")


def imports(path: Path) -> Iterator[str]:
    """Full dotted names of everything that a file imports, wherever in the file."""
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def ours(name: str) -> str | None:
    return name.removeprefix("epsball.") if name.startswith("epsball.") else None


def calls(path: Path) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def ids(path: Path) -> str:
    return path.relative_to(SRC).as_posix()


def test_there_is_something_to_check() -> None:
    assert len(FILES) > 20
    assert {"core", "threats", "objectives", "attacks"} <= {part_of(path) for path in FILES}


@pytest.mark.parametrize("path", [path for path in FILES if part_of(path) in ALLOWED], ids=ids)
def test_imports_point_one_way(path: Path) -> None:
    allowed = ALLOWED[part_of(path)]
    for name in imports(path):
        inner = ours(name)
        if inner is not None:
            assert any(inner == part or inner.startswith(part + ".") for part in allowed), f"{ids(path)} imports {name}"


@pytest.mark.parametrize("path", FILES, ids=ids)
def test_nobody_but_the_command_line_knows_the_command_line(path: Path) -> None:
    if part_of(path) not in ("cli", "__main__"):
        assert not any((ours(name) or "").startswith("cli") for name in imports(path))


@pytest.mark.parametrize("path", FILES, ids=ids)
def test_nobody_but_the_command_line_knows_the_experiments(path: Path) -> None:
    if part_of(path) not in ("cli", "reproduce"):
        assert not any((ours(name) or "").startswith("reproduce") for name in imports(path))


@pytest.mark.parametrize("path", [path for path in FILES if part_of(path) in OUTSIDE], ids=ids)
def test_the_core_stands_on_torch_and_numpy_alone(path: Path) -> None:
    for name in imports(path):
        top = name.split(".")[0]
        assert top == "epsball" or top in sys.stdlib_module_names or top in OUTSIDE[part_of(path)], f"{ids(path)} imports {name}"


@pytest.mark.parametrize("path", [path for path in FILES if part_of(path) in NO_TORCH], ids=ids)
def test_reports_and_stores_touch_no_model(path: Path) -> None:
    assert not {name.split(".")[0] for name in imports(path)} & {"torch", "torchvision", "transformers"}


LIGHT = [
    "epsball",
    "epsball.errors",
    *(f"epsball.{part}" for part in ("cli", "report", "store", "auditing.results") if (SRC / part.split(".")[0]).exists()),
]


@pytest.mark.parametrize("module", LIGHT)
def test_importing_it_does_not_import_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0, f"import {module} imports torch"


def test_public_names_resolve() -> None:
    assert sorted(epsball.__all__) == dir(epsball)
    for name in epsball.__all__:
        assert getattr(epsball, name) is not None
    with pytest.raises(AttributeError, match="nothing"):
        epsball.nothing  # noqa: B018


FORKS = ("core/victim.py", "models/load.py")  # fork the generators for models that draw, and put them back
SEEDS = {
    "random.seed",
    "np.random.seed",
    "numpy.random.seed",
    "torch.manual_seed",
    "torch.seed",
    "torch.cuda.manual_seed",
    "torch.cuda.manual_seed_all",
}
GLOBAL_DRAWS = re.compile(
    r"^(np|numpy)\.random\.(?!default_rng|Generator|Philox|PCG64|SeedSequence|get_state|set_state|bit_generator)\w+$|^random\.(?!Random$|getstate$|setstate$)\w+$"
)
TORCH_DRAWS = {
    f"torch.{name}"
    for name in ("rand", "randn", "randint", "randperm", "rand_like", "randn_like", "randint_like", "bernoulli", "multinomial", "normal")
}


@pytest.mark.parametrize("path", FILES, ids=ids)
def test_no_global_randomness(path: Path) -> None:
    for name, call in calls(path):
        if ids(path) in FORKS and name in SEEDS:
            continue
        assert name not in SEEDS, f"{ids(path)}:{call.lineno} {name}"
        assert not GLOBAL_DRAWS.match(name), f"{ids(path)}:{call.lineno} {name}"
        if name in TORCH_DRAWS:
            assert any(word.arg == "generator" for word in call.keywords), f"{ids(path)}:{call.lineno} {name} without a generator"


@pytest.mark.parametrize("where", FORKS)
def test_whoever_seeds_puts_back(where: str) -> None:
    called = {name for name, _ in calls(SRC / where)}
    assert called & SEEDS, "no longer seeds anything: take it off the list"
    assert "random.setstate" in called
    assert called & {"torch.set_rng_state", "torch.random.fork_rng"}
    assert "np.random.set_state" in called


@pytest.mark.parametrize("path", FILES, ids=ids)
def test_forbidden_calls(path: Path) -> None:
    for name, call in calls(path):
        where = f"{ids(path)}:{call.lineno}"
        assert name not in ("print", "eval", "exec", "breakpoint"), f"{where} {name}"
        if name == "torch.load":
            words = {word.arg: ast.unparse(word.value) for word in call.keywords}
            assert words.get("weights_only") in ("True", "not trust_code"), f"{where} torch.load may run code that nobody vouched for"
        if name in ("np.load", "numpy.load"):
            assert not any(word.arg == "allow_pickle" and ast.unparse(word.value) != "False" for word in call.keywords), where
        if name == "yaml.load":
            pytest.fail(f"{where}: yaml.safe_load")
    risky = {name for name in imports(path) if name.split(".")[0] in ("pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve")}
    used = {ast.unparse(node) for node in ast.walk(TREES[path]) if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "pickle"}
    # To catch its error loads nothing.
    assert (risky - {"pickle"}) | used <= {"pickle.UnpicklingError"}, f"{ids(path)}: {risky | used}"


@pytest.mark.parametrize("path", FILES, ids=ids)
def test_files_and_functions_stay_short(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) < 450
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.FunctionDef):
            body = node.body[1:] if ast.get_docstring(node) and len(node.body) > 1 else node.body
            assert body[-1].end_lineno is not None
            lines = body[-1].end_lineno - body[0].lineno + 1
            assert lines <= 45, f"{ids(path)}:{node.lineno} {node.name}: {lines} lines"


@pytest.mark.parametrize("name", list(entries()))
def test_every_recipe_says_what_it_is(name: str) -> None:
    entry = entries()[name]
    assert entry.summary
    assert entry.summary.endswith(".")
    assert re.search(r"arXiv \d{4}\.\d{4,5}|doi", entry.paper), f"{name}: {entry.paper}"
    assert re.search(r"\b(19|20)\d\d\b", entry.paper)
    assert entry.cost
    assert entry.kind in ("fixed", "smallest")
    assert entry.threats
    assert entry.recipe().name == name
