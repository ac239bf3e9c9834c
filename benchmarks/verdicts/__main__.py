"""Does the audit find out? Broken defenses and honest controls: `python benchmarks/verdicts --n 100 --seed 0`, see run.py."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

from verdicts.run import main  # noqa: E402

if __name__ == "__main__":
    main()
