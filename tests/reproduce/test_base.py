from pathlib import Path

import pytest

from epsball.errors import BadInput
from epsball.reproduce import EXPERIMENTS, Finding, Line, Setting, experiment, experiments, run
from epsball.reproduce.base import find, mean_of, percent_of


@pytest.fixture
def planted(monkeypatch):
    """An experiment that is only there for one test."""
    monkeypatch.setattr("epsball.reproduce.base.EXPERIMENTS", {})
    asked = []

    @experiment("planted", title="A planted one", paper="Nobody 2000, arXiv 0001.0001", needs=("mnist",), minutes=1)
    def body(setting):
        asked.append(setting)
        return Finding((Line("share", "1 %", percent_of(1, 2)),))

    return asked


def test_a_registered_function_is_found_and_run_with_its_setting(planted, tmp_path):
    (tmp_path / "mnist").mkdir()
    (tmp_path / "mnist" / "mnist.npz").touch()
    setting = Setting(data=tmp_path, seed=3)
    assert find("planted").title == "A planted one"
    assert run("planted", setting).lines[0].ours == "50.0 % [1.3, 98.7], n = 2"
    assert planted == [setting]


def test_a_name_is_taken_once(planted):
    with pytest.raises(BadInput, match="'planted': registered twice"):
        experiment("planted", title="Again", paper="", minutes=1)(lambda setting: Finding(()))


def test_unknown_names_are_told_what_there_is():
    with pytest.raises(BadInput, match=r"'fgms': unknown: use one of .*fgsm-softmax"):
        find("fgms")


def test_missing_data_is_told_before_anything_runs(planted, tmp_path):
    with pytest.raises(BadInput, match=r"EPSBALL_DATA: not set: point it at a folder that holds mnist/mnist\.npz"):
        run("planted", Setting())
    with pytest.raises(BadInput, match=r"has no mnist/mnist\.npz"):
        run("planted", Setting(data=tmp_path))
    assert planted == []


def test_all_of_them_are_there_oldest_paper_first():
    known = list(experiments())
    assert set(known) == set(EXPERIMENTS)
    assert {"fgsm-softmax", "fgsm-maxout", "signed-epsilon", "rubbish", "generalize", "loss-surface"} <= set(known)
    assert known[0] == "generalize"  # arXiv 1312
    assert known.index("fgsm-softmax") < known.index("loss-surface")


@pytest.mark.parametrize("name", list(experiments()))
def test_every_experiment_says_what_it_needs(name):
    entry = experiments()[name]
    assert entry.title
    assert entry.needs
    assert set(entry.needs) <= {"mnist", "cifar"}
    assert 0 < entry.minutes < 120
    assert "arXiv" in entry.paper


def test_how_many_samples():
    assert Setting().count(1000, quick=10) == 1000
    assert Setting(quick=True).count(1000, quick=10) == 10
    assert Setting(n=7).count(1000, quick=10) == 7
    assert Setting(n=7, quick=True).count(1000, quick=10) == 7


def test_means_have_the_normal_interval():
    assert mean_of([], 1) == "no sample"
    assert mean_of([0.25], 2) == "0.25, n = 1"
    # Standard error of (1, 2, 3, 4): sqrt(5 / 3 / 4) = 0.6455, times 1.96 = 1.265.
    assert mean_of([1.0, 2.0, 3.0, 4.0], 3, " px") == "2.500 px [1.235, 3.765], n = 4"
    assert percent_of(0, 0) == "no sample"


def test_the_setting_points_at_files(tmp_path):
    (tmp_path / "cifar10_jpeg").mkdir()
    assert Setting(data=tmp_path).place("cifar") == Path(tmp_path / "cifar10_jpeg")
