"""The four numbers of a row, each kept in a file of its own under a hash of everything that it depends on."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import inspect
import json
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn

import epsball as eb
from epsball.data import Dataset
from verdicts.bases import FOLDER
from verdicts.case import Case
from verdicts.search import DRAWS, broken

SOURCE = Path(eb.__file__).parent
READ_BY_AUDITS = ("core", "threats", "objectives", "attacks", "auditing", "models", "door.py")
Result = dict[str, Any]


class Counts:
    """Rows forward through a module and rows backward through its output, by hooks: the module itself is what everybody sees."""

    def __init__(self, model: nn.Module) -> None:
        self.rows = rows = {"forwards": 0, "backwards": 0}

        def back(gradient: Tensor) -> None:
            rows["backwards"] += len(gradient)

        def count(module: nn.Module, inputs: Any, output: Tensor) -> None:
            rows["forwards"] += len(output)
            if output.requires_grad:
                output.register_hook(back)

        self.handle = model.register_forward_hook(count)


def naive(case: Case, model: nn.Module, data: Dataset, seed: int) -> Result:
    """The number that the defense's own evaluation gives; one draw judges a random model."""
    judge = (case.lenient or case.judge)(model) if not case.random else lambda z, y: model(z).argmax(1) != y
    gone = broken((case.naive,), model, judge, data.x, data.y, case.radius, 10)
    with torch.no_grad():
        clean = model(data.x).argmax(1) == data.y
    return {"stands": (~gone).tolist(), "clean": int(clean.sum())}


def true(case: Case, model: nn.Module, data: Dataset, seed: int) -> Result:
    """Every attack of one who knows the defense, and the naive one: what none of them breaks."""
    attacks = (case.naive, *case.adaptive)
    gone = broken(attacks, model, case.judge(model), data.x, data.y, case.radius, 10)
    if case.lenient is None:
        return {"stands": (~gone).tolist()}
    spared = ~broken(attacks, model, case.lenient(model), data.x, data.y, case.radius, 10)
    return {"stands": (~gone).tolist(), "spared": int(spared.sum())}


def official(case: Case, model: nn.Module, data: Dataset, seed: int, version: str = "standard") -> Result:
    """AutoAttack as released; its own book says what stands."""
    recipe = importlib.import_module("autoattack").AutoAttack
    x, y = data.x[: case.official], data.y[: case.official]
    counts = Counts(model)
    try:
        attack = recipe(model, norm="Linf", eps=case.radius, seed=seed, version=version, device="cpu", verbose=False)
        said: list[str] = []
        attack.logger.log = said.append
        attack.apgd.logger.log = said.append
        _, answers = attack.run_standard_evaluation(x, y, bs=len(x), return_labels=True)
        found = {"stands": (answers == y).tolist(), "said": sorted({line.removeprefix("Warning: ")[:120] for line in said})}
    except RuntimeError as error:  # a model without any gradient cannot be differentiated
        sys.settrace(None)
        found = {"stands": None, "said": [f"raises {type(error).__name__}: {str(error)[:90]}"]}
    return {**found, **counts.rows}


def rand(case: Case, model: nn.Module, data: Dataset, seed: int) -> Result:
    """AutoAttack's version for random models."""
    return official(case, model, data, seed, "rand")


def audit(case: Case, model: nn.Module, data: Dataset, seed: int) -> Result:
    """What the audit says without being told anything."""
    counts, folder = Counts(model), FOLDER / "runs" / case.name.replace(" ", "-")
    try:
        report = eb.audit(model, data, f"linf:{case.radius}", seed=seed, out=folder)
    except Exception as error:  # an audit that raises is a result, too, and a wrong one
        said = f"{type(error).__name__}: {str(error)[:200]}"
        return {"stands": None, "trustworthy": False, "flags": [], "findings": [], "raised": said, **counts.rows}
    from epsball.store import evidence

    arrays, _ = evidence.read(folder / evidence.NAME)
    stands = dict(zip(arrays["m0/index"].tolist(), arrays["m0/correct"].tolist(), strict=True))
    for row in arrays["m0/linf/rows"].tolist():
        stands[int(arrays["m0/index"][row])] = False
    about, result = report.models[0], report.models[0].results[0]
    assert sum(stands.values()) - result.robust_accuracy.count in range(result.robust_accuracy.unknown + 1)
    return {
        "stands": [stands[index] for index in data.indices.tolist()],
        "trustworthy": result.trustworthy,
        "flags": [flag.model_dump() for flag in (*about.flags, *result.flags)],
        "findings": [finding.model_dump() for finding in about.findings if finding.status != "pass"],
        "attacks": [row.model_dump(exclude={"recipe"}) for row in result.attacks],
        **counts.rows,
    }


STAGES: dict[str, Callable[[Case, nn.Module, Dataset, int], Result]] = {
    "naive": naive,
    "true": true,
    "official": official,
    "rand": rand,
    "audit": audit,
}


def able(stage: str) -> bool:
    """What the stage needs can be imported here."""
    needs = {"official": "autoattack", "rand": "autoattack", "audit": "pydantic"}.get(stage, "torch")
    return importlib.util.find_spec(needs) is not None


def wanted(case: Case, stage: str) -> bool:
    """AutoAttack's version for random models is for these alone."""
    return stage != "rand" or case.random


def result(case: Case, stage: str, data: Dataset, seed: int, model: Callable[[], nn.Module], compute: bool) -> Result | None:
    """From the cache, or computed now; None where it is neither there nor asked for, or cannot be computed here."""
    path = FOLDER / f"{case.name.replace(' ', '-')}-{stage}-{len(data.x)}-{seed}.json"
    key = name(case, stage, data, seed, model())
    if path.exists():
        kept: Result = json.loads(path.read_text(encoding="utf8"))
        if kept["key"] == key or not compute:
            return {**kept, "stale": kept["key"] != key}
    if not compute or not able(stage):
        return None
    torch.manual_seed(seed)
    started = time.process_time()
    found = {**STAGES[stage](case, case.model(), data, seed), "seconds": time.process_time() - started, "key": key}
    path.write_text(json.dumps(found), encoding="utf8")
    return {**found, "stale": False}


def name(case: Case, stage: str, data: Dataset, seed: int, model: nn.Module) -> str:
    """Hash of the samples, the weights, the code of the model and of the attacks, and for audits that of the library."""
    digest = hashlib.blake2b(digest_size=8)
    for value in (data.x, data.y, *model.state_dict().values()):
        for tensor in value if isinstance(value, tuple) else (value,):  # packed weights of 8 bits come with their bias
            if isinstance(tensor, torch.Tensor):
                whole = tensor.int_repr() if tensor.is_quantized else tensor
                digest.update(whole.contiguous().detach().numpy().tobytes())
    words = [repr(model), str(case.radius), str(seed), *code({type(part) for part in model.modules()})]
    if stage in ("naive", "true"):
        attacks = (case.naive,) if stage == "naive" else (case.naive, *case.adaptive)
        judges = {case.judge} if case.lenient is None else {case.judge, case.lenient}
        words += [str(DRAWS), str(case.random), *code({*judges, *(type(one) for one in attacks), broken})]
        words += [text for one in attacks for text in _settings(one)]
    elif stage == "audit":
        words += [text for part in READ_BY_AUDITS for text in _files(SOURCE / part)]
    else:
        words.append(str(case.official))
    for word in words:
        digest.update(word.encode())
    return digest.hexdigest()


def _settings(attack: Any) -> list[str]:
    parts = vars(attack)
    return [
        *(f"{k}={v}" for k, v in parts.items() if not callable(v)),
        *(text for v in parts.values() if callable(v) for text in code({v})),
    ]


@cache
def _files(path: Path) -> list[str]:
    """What the files do: their syntax without comments and docstrings, whose change ages no number."""
    texts = (file.read_text(encoding="utf8") for file in sorted(path.rglob("*.py") if path.is_dir() else [path]))
    return [ast.dump(_Bare().visit(ast.parse(text))) for text in texts]


class _Bare(ast.NodeTransformer):
    """Drops every expression that is only a string."""

    def visit_Expr(self, node: ast.Expr) -> ast.Expr | None:
        return None if isinstance(node.value, ast.Constant) and isinstance(node.value.value, str) else node


def code(roots: set[Any]) -> list[str]:
    """The sources of functions and classes of this folder, and of all of this folder that they name, sorted."""
    found: dict[str, str] = {}
    waiting = [*roots]
    while waiting:
        thing = inspect.unwrap(waiting.pop())
        home, own = str(getattr(thing, "__module__", "")), getattr(thing, "__code__", None)
        known = f"{home}.{getattr(thing, '__qualname__', '')}:{getattr(own, 'co_firstlineno', 0)}"
        if not home.startswith("verdicts.") or known in found or not (inspect.isclass(thing) or inspect.isfunction(thing)):
            continue
        functions = [f for f in vars(thing).values() if inspect.isfunction(f)] if inspect.isclass(thing) else [thing]
        functions = [f for f in functions if not f.__code__.co_filename.startswith("<")]  # what dataclasses write has no source
        found[known] = inspect.getsource(thing) if functions or inspect.isclass(thing) else ""
        for function in functions:
            waiting += [function.__globals__[word] for word in _named(function.__code__) if word in function.__globals__]
            for cell in function.__closure__ or ():
                found[known] += "" if callable(cell.cell_contents) else repr(cell.cell_contents)
                waiting += [cell.cell_contents] if callable(cell.cell_contents) else []
    return sorted(found.values())


def _named(code: CodeType) -> set[str]:
    """Names that a function reads, and those of the functions inside it."""
    inner = [part for part in code.co_consts if isinstance(part, CodeType)]
    return set(code.co_names).union(*map(_named, inner))
