"""The commands."""

from __future__ import annotations

import json
import shlex
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from epsball.cli import certify as bounds
from epsball.cli.compare import EXAMPLES as COMPARISONS
from epsball.cli.compare import compare
from epsball.cli.gate import FailUnder, Junit, Sarif, below, exit_code, write_findings
from epsball.cli.limits import MaxForwards, MaxSeconds, Union, UntilWidth, limits_of
from epsball.cli.reproduce import EXAMPLES, reproduce
from epsball.cli.served import Asked, RateLimit, Timeout, TokenEnv, endpoint_of, with_token
from epsball.cli.train import EXAMPLES as TRAIN_EXAMPLES
from epsball.cli.train import train

if TYPE_CHECKING:
    from epsball.data import Dataset
    from epsball.door import Loaded

app = typer.Typer(
    name="epsball",
    add_completion=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    help="How robust is your model, really? Attacks it, doubts itself, and shows evidence that anyone can re-check.",
    epilog="Exit codes: 0 fine, 1 below --fail-under, 2 bad input, 3 a verification failed, 130 stopped early (a partial report is kept).",
)


class Bounds(StrEnum):
    """Ways to prove lower bounds."""

    interval = "interval"
    crown = "crown"
    best = "best"


class Effort(StrEnum):
    """How hard to try."""

    fast = "fast"
    default = "default"
    max = "max"


ModelArg = Annotated[
    str | None,
    typer.Argument(
        metavar="[MODEL]",
        help="package.module:factory, file.py:factory, a .pt2 or .onnx file, http://HOST/v2/models/NAME, or a builtin name.",
    ),
]
Weights = Annotated[
    str | None, typer.Option("--weights", "-w", metavar="FILE", help="A .safetensors file or a torch checkpoint with plain tensors.")
]
DataOpt = Annotated[str, typer.Option("--data", "-d", help="digits, a .npz, an image folder, MNIST idx files, Parquet, or hf:PATH.")]
Split = Annotated[str, typer.Option(help="Part of the data, where it has several.")]
Layout = Annotated[str, typer.Option(help="Axes of an image: auto, hw, hwc, chw or flat; raw: leave inputs as they are.")]
Mean = Annotated[str | None, typer.Option(metavar="M[,M,M]", help="Mean that the model's inputs are normalized by.")]
Std = Annotated[str | None, typer.Option(metavar="S[,S,S]", help="Standard deviation that they are normalized by.")]
Box = Annotated[str, typer.Option(metavar="LOW,HIGH", help="Legal range of inputs.")]
Outputs = Annotated[str, typer.Option(help="What the model returns: logits, probabilities or multilabel.")]
Classes = Annotated[
    str | None, typer.Option(metavar="NAME,...", help="The model's class names in its order, when folders sort differently.")
]
Count = Annotated[int, typer.Option("--n", "-n", min=1, help="At most so many samples, spread over the classes.")]
Seed = Annotated[int, typer.Option(help="Of everything random.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")]
Batch = Annotated[str, typer.Option(metavar="auto|N", help="Most rows per model call; results do not depend on it.")]
Trust = Annotated[bool, typer.Option("--trust-code", help="Load pickles and other files that can run code. Only for files you made.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object on stdout and nothing else.")]


@app.callback(invoke_without_command=True)
def _root(ctx: typer.Context, version: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False) -> None:
    if version:
        from epsball import __version__

        typer.echo(__version__)
        raise typer.Exit
    if ctx.invoked_subcommand is None:
        typer.echo(ctx.get_help())
        raise typer.Exit


@app.command(
    epilog="Examples: epsball audit | epsball audit net.py:make -w net.safetensors "
    "-d mnist.npz --threat linf:0.1,0.2 --threat l2:2 -n 1000 "
    "| epsball audit digits-robust --fail-under 40 --json "
    "| epsball audit --max-seconds 60 | epsball audit --until-width 10pp -t linf:0.1 -t l2:1 --union "
    "| epsball audit https://HOST/v2/models/NAME --token-env NAME_TOKEN -d x.npz"
)
def audit(
    model: ModelArg = None,
    weights: Weights = None,
    data: DataOpt = "digits",
    threat: Annotated[
        list[str] | None,
        typer.Option(
            "--threat",
            "-t",
            help="NAME:RADIUS[,RADIUS]; linf, l2, l1, l0 (pixels), l0f, flow (pixels), color, color-luv, "
            "rigid (share of 30 degrees, 3 pixels), patch (side in pixels); several at once: color+linf:0.06+8/255.",
        ),
    ] = None,
    n: Count = 1000,
    effort: Annotated[Effort, typer.Option(help="How hard to try.")] = Effort.default,
    seed: Seed = 0,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="DIR", help="Folder of the run; a new one under runs/ by default.")
    ] = None,
    fail_under: FailUnder = None,
    max_seconds: MaxSeconds = None,
    max_forwards: MaxForwards = None,
    until_width: UntilWidth = None,
    union: Union = False,
    junit: Junit = None,
    sarif: Sarif = None,
    mean: Mean = None,
    std: Std = None,
    box: Box = "0,1",
    outputs: Outputs = "logits",
    classes: Classes = None,
    split: Split = "test",
    layout: Layout = "auto",
    device: Device = "cpu",
    batch_size: Batch = "auto",
    max_queries: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="For a model without gradients: most rows per sample and radius that the search asks; by effort 300, 2000 or 10000.",
        ),
    ] = None,
    certify_by: Annotated[
        Bounds | None,
        typer.Option("--certify", help="Prove a lower bound beside the attacks, under norms: interval is quick, best is tight."),
    ] = None,
    trust_code: Trust = False,
    token_env: TokenEnv = None,
    timeout: Timeout = None,
    rate_limit: RateLimit = None,
    endpoint: Asked = None,
    as_json: AsJson = False,
) -> None:
    """Say how robust a model is: attacks, a referee, intervals, and a report with evidence. Without MODEL: two digit classifiers."""
    from epsball.cli.show import Live, tell
    from epsball.door import audit_loaded
    from epsball.models.digits import NAMES

    dataset = _data(data, n, seed, split, layout, box, classes)
    options = _model_options(
        weights,
        mean,
        std,
        box,
        outputs,
        trust_code,
        endpoint_of(token_env, timeout, rate_limit, _options(endpoint or [], "--endpoint", "retries=3")),
    )
    if model is None and options != _model_options(None, None, None, "0,1", "logits", False, None):
        raise typer.BadParameter(
            "--weights, --mean, --std, --box, --outputs, --trust-code and options of addresses describe a MODEL: name it first"
        )
    _writable("junit", junit)
    _writable("sarif", sarif)
    limits = limits_of(max_seconds, max_forwards, until_width, fail_under)
    loaded = [_model(source, device, batch_size, options if model else {}) for source in ([model] if model else NAMES)]
    with Live() as live:
        done = audit_loaded(
            loaded,
            dataset,
            threat,
            effort=effort.value,
            seed=seed,
            out=out,
            batch_size=_batch(batch_size),
            max_queries=max_queries,
            certify=certify_by.value if certify_by else None,
            limits=limits,
            union=union,
            progress=live,
            command=_command(),
        )
    write_findings(done, fail_under, junit, sarif)
    tell(done, as_json, model)
    raise typer.Exit(exit_code(done, fail_under))


@app.command(
    epilog="Examples: epsball attack pgd digits-robust --threat linf:0.1 --set steps=100 "
    "| epsball attack apgd_t net.py:make -d x.npz -t l2:1 --save adv.npz"
)
def attack(
    name: Annotated[str, typer.Argument(help="As in epsball list.")],
    model: Annotated[str, typer.Argument(help="As for audit.")],
    weights: Weights = None,
    data: DataOpt = "digits",
    threat: Annotated[str, typer.Option("--threat", "-t", help="NAME:RADIUS, as for audit.")] = "linf:0.1",
    settings: Annotated[list[str] | None, typer.Option("--set", "-s", metavar="NAME=VALUE", help="An option of the attack.")] = None,
    target: Annotated[int | None, typer.Option(help="Class to reach; any other class by default.")] = None,
    save: Annotated[Path | None, typer.Option(metavar="FILE.npz", help="Keep x, y, x_adv, reached and size.")] = None,
    n: Count = 1000,
    seed: Seed = 0,
    mean: Mean = None,
    std: Std = None,
    box: Box = "0,1",
    outputs: Outputs = "logits",
    classes: Classes = None,
    split: Split = "test",
    layout: Layout = "auto",
    device: Device = "cpu",
    batch_size: Batch = "auto",
    trust_code: Trust = False,
    token_env: TokenEnv = None,
    timeout: Timeout = None,
    rate_limit: RateLimit = None,
    endpoint: Asked = None,
    as_json: AsJson = False,
) -> None:
    """Run one attack at one radius and say what it broke; for a verdict, use audit."""
    from epsball.attacks import get
    from epsball.cli.single import check_options, run_attack
    from epsball.threats import parse_threat

    spec = parse_threat(threat)
    if len(spec.radii) != 1:
        raise typer.BadParameter(f"--threat {threat}: one radius is needed here; audit takes several")
    options = _options(settings or [])
    check_options(name, options)
    search = get(name, threat=spec.threat, **options)
    _writable("save", save)
    dataset = _data(data, n, seed, split, layout, box, classes)
    asked = endpoint_of(token_env, timeout, rate_limit, _options(endpoint or [], "--endpoint", "retries=3"))
    loaded = _model(model, device, batch_size, _model_options(weights, mean, std, box, outputs, trust_code, asked))
    told = run_attack(search, loaded, dataset, spec.radii[0], target, seed, save)
    if as_json:
        sys.stdout.write(json.dumps(told) + "\n")
        return
    for key, value in told.items():
        typer.echo(f"{key:22} {value}")


@app.command(epilog="Example: epsball verify runs/first")
def verify(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run.")],
    model: Annotated[
        list[str] | None, typer.Option("--model", help="Where the model is now, once per model; as in the run by default.")
    ] = None,
    token_env: TokenEnv = None,
    as_json: AsJson = False,
) -> None:
    """Re-check a run's claims from its evidence: loads the models afresh, one forward pass, no attack."""
    from epsball.cli import EXIT_MISMATCH
    from epsball.door import verify as check
    from epsball.report.text import radius_of
    from epsball.store import evidence

    stored = evidence.header(run / evidence.NAME)["models"]
    for settings in [] if model else stored:
        if ":" in settings["spec"].get("source", ""):  # a factory: code of whoever wrote the file that it names
            typer.echo(f"loading {settings['spec']['source']}, as the run says; --model names another", err=True)
    lines = check(run, model if token_env is None else with_token([settings["spec"] for settings in stored], model, token_env))
    if as_json:
        rows = [{**vars(line), "holds": line.holds} for line in lines]
        sys.stdout.write(json.dumps({"run": str(run), "holds": all(line.holds for line in lines), "claims": rows}) + "\n")
    else:
        for line in lines:
            what = "clean accuracy" if line.threat == "clean" else f"{line.threat} {radius_of(line.threat, line.radius)}"
            seen = "not in the evidence" if line.seen is None else f"{line.seen} of {line.n} stand"
            said = "leaves it out" if line.claimed is None else f"says {line.claimed}"
            figures = "" if line.follows else ", its figures do not follow from the evidence"
            word = "holds" if line.holds else f"DOES NOT HOLD (the report {said}, {line.rejected} stored inputs rejected{figures})"
            typer.echo(f"{line.model:24} {what:18} {seen:22} {word}")
    raise typer.Exit(0 if all(line.holds for line in lines) else EXIT_MISMATCH)


@app.command("list", epilog="Example: epsball list --json")
def list_(as_json: AsJson = False) -> None:
    """What there is: attacks with paper, access, threats and cost; threats; builtin models and data."""
    from epsball.cli.single import catalog

    found = catalog()
    if as_json:
        sys.stdout.write(json.dumps(found) + "\n")
        return
    for entry in found["attacks"]:
        typer.echo(f"{entry['name']:10} {entry['summary']}")
        typer.echo(f"{'':10} {entry['paper']}; needs {entry['access']}; {', '.join(entry['threats'])}; cost: {entry['cost']}")
    for kind in ("threats", "objectives", "models", "data"):
        typer.echo(f"{kind:10} {', '.join(found[kind])}")


@app.command("report", epilog="Example: epsball report runs/first --junit robustness.xml")
def report_(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run.")],
    junit: Junit = None,
    sarif: Sarif = None,
    fail_under: Annotated[
        float | None, typer.Option(metavar="PERCENT", min=0, max=100, help="As for audit: exit 1 if any robust accuracy is below.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show a finished run again and render its page anew; no model is touched."""
    from epsball import report
    from epsball.cli.show import tell
    from epsball.store.evidence import NAME

    _writable("junit", junit)
    _writable("sarif", sarif)
    done = report.read_json(run / "report.json")
    report.write(done, run / NAME, run / "report.html")
    write_findings(done, fail_under, junit, sarif)
    tell(done, as_json, "as before")
    raise typer.Exit(below(done, fail_under))


@app.command(epilog="Example: epsball doctor")
def doctor(as_json: AsJson = False) -> None:
    """Say what is installed and what is broken, one sentence each."""
    from epsball.cli.doctor import diagnose

    found = list(diagnose())
    if as_json:
        sys.stdout.write(json.dumps([vars(one) for one in found]) + "\n")
    else:
        for one in found:
            typer.echo(f"{one.state:8} {one.sentence}")
    raise typer.Exit(1 if any(one.illness for one in found) else 0)


app.command(epilog=COMPARISONS)(compare)
app.command(epilog=EXAMPLES)(reproduce)
app.command(epilog=bounds.EXAMPLES)(bounds.certify)
app.command(epilog=TRAIN_EXAMPLES)(train)


def _command() -> str:
    return shlex.join(["epsball", *sys.argv[1:]])


def _writable(name: str, path: Path | None) -> None:
    """Says so before anything is computed, not after."""
    if path is not None and (path.is_dir() or not path.parent.is_dir()):
        why = "is a folder" if path.is_dir() else "its folder does not exist"
        raise typer.BadParameter(f"--{name} '{path}': {why}: give a file in a folder that exists")


def _floats(name: str, text: str | None) -> list[float] | None:
    if text is None:
        return None
    try:
        return [float(word) for word in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"--{name} '{text}': write numbers with commas, as 0.5,0.5,0.5") from None


def _box(text: str) -> tuple[float, float]:
    ends = _floats("box", text) or []
    if len(ends) != 2:
        raise typer.BadParameter(f"--box '{text}': write two numbers, as 0,1")
    return ends[0], ends[1]


def _batch(text: str) -> int | None:
    if text == "auto":
        return None
    if not text.isdigit() or int(text) < 1:
        raise typer.BadParameter(f"--batch-size '{text}': write auto or a whole number above 0")
    return int(text)


def _options(pairs: list[str], option: str = "--set", example: str = "steps=100") -> dict[str, Any]:
    """NAME=VALUE words; values are numbers or true/false where they look like it, else words."""
    found: dict[str, Any] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise typer.BadParameter(f"{option} '{pair}': write NAME=VALUE, as {example}")
        try:
            found[name.strip()] = json.loads(value)
        except json.JSONDecodeError:
            found[name.strip()] = value
    return found


def _model_options(
    weights: str | None, mean: str | None, std: str | None, box: str, outputs: str, trust_code: bool, endpoint: dict[str, Any] | None
) -> dict[str, Any]:
    return {
        "weights": weights,
        "mean": _floats("mean", mean),
        "std": _floats("std", std),
        "box": _box(box),
        "outputs": outputs,
        "trust_code": trust_code,
        "endpoint": endpoint,
    }


def _model(source: str, device: str, batch_size: str, options: dict[str, Any]) -> Loaded:
    import torch

    from epsball.door import open_model

    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, ImportError) as error:
        raise typer.BadParameter(f"--device '{device}': {str(error).splitlines()[0]}") from None
    if device.startswith("meta"):
        raise typer.BadParameter("--device 'meta': holds no numbers: use cpu or cuda")
    return open_model(source, batch_size=_batch(batch_size), device=device, **options)


def _data(data: str, n: int, seed: int, split: str, layout: str, box: str, classes: str | None) -> Dataset:
    from epsball.data import load_data

    names = [name.strip() for name in classes.split(",")] if classes else None
    return load_data(data, n=n, seed=seed, split=split, layout=layout, box=_box(box), class_order=names)  # type: ignore[arg-type]
