"""Every experiment on tiny sizes: it runs, its table is whole, its pictures are documents."""

import os
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from epsball.errors import BadInput
from epsball.reproduce import Setting, experiments, run

ROOT = os.environ.get("EPSBALL_DATA")


FAST = {"fgsm-softmax", "rubbish", "signed-epsilon"}
NAMES = [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in experiments()]


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("nets")


@pytest.mark.parametrize("name", NAMES)
def test_it_runs(name, cache):
    setting = Setting(Path(ROOT) if ROOT else None, seed=1, quick=True, cache=cache)
    try:
        for need in experiments()[name].needs:
            setting.place(need)
    except BadInput as error:
        pytest.skip(str(error))
    finding = run(name, setting)
    assert finding.lines
    for line in finding.lines:
        assert line.what
        assert line.paper
        assert re.search(r"\d|no sample", line.ours), line
        assert "nan" not in line.ours
    assert len({line.what for line in finding.lines}) == len(finding.lines)
    assert len({figure.name for figure in finding.figures}) == len(finding.figures)
    for figure in finding.figures:
        ElementTree.fromstring(figure.svg)
        assert figure.caption
        assert "nan" not in re.sub(r'href="[^"]*"', "", figure.svg)
