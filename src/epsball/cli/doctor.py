"""`epsball doctor`: what is installed, what is broken, in one sentence each."""

from __future__ import annotations

import importlib
import importlib.util
import platform
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

_NEEDED = ("torch", "numpy", "scipy", "PIL", "safetensors", "pydantic", "yaml", "jinja2", "rich", "typer", "sklearn")
_EXTRAS = {
    "pyarrow": "Parquet data (extra store)",
    "datasets": "hf: data (extra hf)",
    "transformers": "Hugging Face models (extra hf)",
    "onnxruntime": "ONNX files (extra onnx)",
    "httpx": "models behind an address (extra http)",
    "jax": "JAX functions (extra jax)",
    "torchvision": "nothing of epsball, but maybe your model (extra vision)",
    "torchaudio": "nothing of epsball, but maybe your model",
}
_DISTRIBUTIONS = {"PIL": "pillow", "yaml": "pyyaml", "sklearn": "scikit-learn"}


@dataclass(frozen=True)
class Diagnosis:
    """One thing looked at. `state` is ok, missing or broken; only a broken or missing necessity is an `illness`."""

    name: str
    state: str
    sentence: str
    illness: bool = False


def diagnose() -> Iterator[Diagnosis]:
    """Looks at Python, every library, the processor and the embedded default."""
    yield Diagnosis("python", "ok", f"Python {platform.python_version()} on {platform.machine()}.")
    for name in _NEEDED:
        yield _library(name, "epsball itself", needed=True)
    for name, purpose in _EXTRAS.items():
        yield _library(name, purpose, needed=False)
    yield from _hardware()


def _library(name: str, purpose: str, needed: bool) -> Diagnosis:
    package = _DISTRIBUTIONS.get(name, name)
    if importlib.util.find_spec(name) is None:
        fix = f"run pip install {package}" if needed else f"install {package} if you need it"
        return Diagnosis(name, "missing", f"{package} is not installed; {purpose} needs it: {fix}.", needed)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            importlib.import_module(name)
    except Exception as error:  # a library built for other hardware can raise anything
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
        message = f"{package} is installed but does not import ({reason}): libraries that import it will fail; reinstall or remove it."
        return Diagnosis(name, "broken", message, needed)
    try:
        found = version(package)
    except PackageNotFoundError:
        found = "unknown version"
    return Diagnosis(name, "ok", f"{package} {found}, for {purpose}.")


def _hardware() -> Iterator[Diagnosis]:
    try:
        import torch
    except Exception:  # reported above
        return
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    words = f"CUDA: {', '.join(devices)}." if devices else "No CUDA device; models run on the CPU."
    yield Diagnosis("device", "ok", f"{words} torch uses {torch.get_num_threads()} threads.")
    from epsball.auditing.remembered import folder

    place = f"kept in {folder()}" if folder() else "kept nowhere, so every process that audits judges them again"
    yield Diagnosis("cache", "ok", f"The last verdict on the canaries is {place}; EPSBALL_CACHE is its folder, or empty for none.")
    try:
        from epsball.models.digits import NAMES, load

        for name in NAMES:
            load(name)(torch.zeros(1, 1, 8, 8))
    except Exception as error:
        yield Diagnosis("builtin", "broken", f"The packaged models do not load ({type(error).__name__}): reinstall epsball.", True)
    else:
        yield Diagnosis("builtin", "ok", "The packaged digit classifiers load and answer: epsball audit will run.")
