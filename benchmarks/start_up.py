"""How long importing and asking for help takes: python benchmarks/start_up.py (medians of interleaved runs)."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

COMMANDS = {
    "import torch": [sys.executable, "-c", "import torch"],
    "import epsball, torch and every public name": [
        sys.executable,
        "-c",
        "import torch, epsball; [getattr(epsball, name) for name in epsball.__all__]",
    ],
    "import epsball": [sys.executable, "-c", "import epsball"],
    "epsball --help": [sys.executable, "-c", "from epsball.cli import main; main(['--help'])"],
    "epsball audit --help": [sys.executable, "-c", "from epsball.cli import main; main(['audit', '--help'])"],
}


def main(runs: int = 11) -> None:
    seconds: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(runs):
        for name, command in COMMANDS.items():
            started = time.perf_counter()
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            seconds[name].append(time.perf_counter() - started)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    lines = [
        "# Start-up",
        "",
        f"`python benchmarks/start_up.py`; medians of {runs} interleaved runs.",
        "",
        "| command | s | ratio to import torch |",
    ]
    lines += ["|---|---|---|", *(f"| {n} | {s:.3f} | {s / medians['import torch']:.2f} |" for n, s in medians.items())]
    print("\n".join(lines))
    (Path(__file__).parent / "results" / "start_up.md").write_text("\n".join(lines) + "\n", encoding="utf8")
    print(json.dumps({"bars met": medians["epsball --help"] < 0.5 and medians["import epsball"] <= 1.2 * medians["import torch"]}))


if __name__ == "__main__":
    main()
