"""Every command through `main`, and the few things that only a process of its own can show."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from epsball.auditing.results import Report
from epsball.cli import main
from epsball.models.digits import load

COMMANDS = ("audit", "attack", "verify", "compare", "list", "report", "doctor")
QUICK = ("--effort", "fast", "-n", "20", "-t", "linf:0.1")
FACTORY = "from epsball.models.digits import network\n\ndef make():\n    return network()\n"


def process(*arguments: str | bytes, **options: Any) -> subprocess.Popen[str]:
    """The command line in a process of its own, with Ctrl-C in its usual meaning whatever the parent made of it."""
    code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from epsball.cli import main; main()"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "encoding": "utf8"}
    return subprocess.Popen([sys.executable, "-c", code, *arguments], **pipes, **options)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "run"
    assert main(["audit", "--effort", "fast", "-n", "20", "-t", "linf:0.05,0.1", "-o", str(folder)]) == 0
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A factory, weights for it and a data set, as a user would have them."""
    import epsball as eb

    (tmp_path / "net.py").write_text(FACTORY)
    save_file(load("digits-standard").state_dict(), tmp_path / "net.safetensors")
    data = eb.load_data("digits", n=30)
    np.savez(tmp_path / "data.npz", x=data.x.numpy(), y=data.y.numpy())
    return tmp_path


# audit


def test_audit_says_what_a_person_needs(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["audit", f"{files}/net.py:make", "-w", f"{files}/net.safetensors", "-d", f"{files}/data.npz", *QUICK]
    assert main([*arguments, "-o", f"{files}/run"]) == 0
    out, err = capsys.readouterr()
    assert "clean accuracy" in out
    assert "linf 0.1" in out
    assert f"Report: {files}/run/report.html" in out
    assert f"epsball verify {files}/run" in out
    assert "The attacks take at most about" in err
    assert {path.name for path in (files / "run").iterdir()} == {"report.json", "report.html", "evidence.safetensors"}


def test_audit_as_json_is_the_report_and_nothing_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["audit", "digits-standard", *QUICK, "-o", f"{tmp_path}/run", "--json"]) == 0
    out, _ = capsys.readouterr()
    assert out.count("\n") == 1
    told = json.loads(out)
    assert told == json.loads((tmp_path / "run" / "report.json").read_bytes())
    assert {"name", "data", "n", "clean_accuracy", "results"} <= set(told["models"][0])
    assert {"models", "seed", "versions", "run"} <= set(told)


def test_audit_without_a_model_audits_the_two_packaged_ones(run: Path) -> None:
    report = Report.model_validate_json((run / "report.json").read_bytes())
    assert [m.name for m in report.models] == ["digits-standard", "digits-robust"]


def test_the_same_seed_gives_the_same_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def told(name: str, seed: str) -> Any:
        capsys.readouterr()
        assert main(["audit", "digits-standard", *QUICK, "--seed", seed, "-o", f"{tmp_path}/{name}", "--json"]) == 0
        report = json.loads(capsys.readouterr().out)
        for part in (report, *(r for m in report["models"] for r in m["results"])):
            part["seconds"] = 0.0
            for row in part.get("attacks", []):
                row["seconds"] = 0.0
        return report | {"run": "", "started": "", "command": ""}

    first, again, other = told("a", "0"), told("b", "0"), told("c", "1")
    assert first == again
    assert first != other
    files = [(tmp_path / name / "evidence.safetensors").read_bytes() for name in ("a", "b", "c")]
    assert files[0] == files[1] != files[2]


@pytest.mark.parametrize(("percent", "code"), [("0", 0), ("100", 1)])
def test_fail_under_decides_the_exit_code_and_junit_says_the_same(percent: str, code: int, tmp_path: Path) -> None:
    arguments = ["audit", "digits-standard", *QUICK, "-o", f"{tmp_path}/run", "--fail-under", percent, "--junit", f"{tmp_path}/j.xml"]
    assert main(arguments) == code
    suite = ElementTree.parse(tmp_path / "j.xml").getroot().find("testsuite")
    assert suite is not None
    assert (suite.get("tests"), suite.get("failures"), suite.get("errors")) == ("1", str(code), "0")


def test_a_number_that_is_not_trusted_is_below_every_bound(files: Path) -> None:
    (files / "crowded.py").write_text(
        "import torch\nfrom epsball.models.digits import load\n\n"
        "class Crowded(torch.nn.Module):\n"
        "    def __init__(self):\n        super().__init__()\n        self.net = load('digits-robust')\n\n"
        "    def forward(self, x):\n        return self.net(x - 0.5 * x.mean(0, keepdim=True))\n\n"
        "def make():\n    return Crowded()\n"
    )
    arguments = ["audit", f"{files}/crowded.py:make", "--effort", "fast", "-n", "20", "-t", "linf:0.01", "-o", f"{files}/run"]
    assert main([*arguments, "--fail-under", "1"]) == 1
    assert main(arguments) == 0


@pytest.mark.parametrize(
    "options", [["--device", "cpu", "--batch-size", "3"], ["--mean", "0", "--std", "1,"], ["--layout", "chw", "--split", "test"]]
)
def test_audit_takes_its_options(options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["audit", "digits-standard", *QUICK, "-o", f"{tmp_path}/run", *options])
    assert code == (2 if "1," in options else 0)


def test_a_path_that_is_not_utf8_does_not_break_json(files: Path) -> None:
    strange = files / "d\udcff.npz"
    shutil.copy(files / "data.npz", strange)
    child = process("audit", "digits-standard", "-d", bytes(strange), *QUICK, "-o", f"{files}/run", "--json")
    out, err = child.communicate(timeout=120)
    assert child.returncode == 0, err
    assert json.loads(out)["models"][0]["n"] == 20


# attack


def test_attack_tells_and_saves_what_it_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["attack", "pgd", "digits-standard", "-n", "30", "-t", "linf:0.1", "-s", "steps=7", "-s", "noise=false"]
    assert main([*arguments, "--save", f"{tmp_path}/adv.npz", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert "steps=7" in told["attack"]
    assert told["samples"] == 30
    with np.load(tmp_path / "adv.npz") as saved:
        assert set(saved) == {"x", "y", "x_adv", "reached", "size"}
        answers = load("digits-standard")(torch.from_numpy(saved["x_adv"])).argmax(1).numpy()
        assert np.array_equal(answers != saved["y"], saved["reached"])
        assert int(saved["reached"].sum()) == told["reached before"] + told["reached by attack"] > 5
        assert (saved["size"] <= 0.1).all()


def test_attack_with_a_target_reaches_that_class(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["attack", "mi-fgsm", "digits-standard", "-n", "30", "-t", "linf:0.3", "--target", "8", "--save", f"{tmp_path}/adv.npz"]
    assert main([*arguments, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["reached by attack"] > 5
    assert told["reached before"] == 3
    with np.load(tmp_path / "adv.npz") as saved:
        answers = load("digits-standard")(torch.from_numpy(saved["x_adv"])).argmax(1).numpy()
        assert np.array_equal(answers == 8, saved["reached"])


def test_attack_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["attack", "fgsm", "digits-robust", "-n", "20", "-s", "objective=margin"]) == 0
    out, err = capsys.readouterr()
    assert "success rate" in out
    assert "objective=margin" in out
    assert err == ""


# verify and report


def test_verify_holds(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(run)]) == 0
    assert capsys.readouterr().out.count("holds") == 6
    assert main(["verify", str(run), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["holds"] is True
    assert all(claim["holds"] and claim["claimed"] == claim["seen"] for claim in told["claims"])


def test_verify_of_a_changed_report_is_exit_code_3(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = json.loads((run / "report.json").read_bytes())
    told["models"][0]["results"][1]["robust_accuracy"]["count"] += 1
    (run / "report.json").write_text(json.dumps(told))
    assert main(["verify", str(run)]) == 3
    assert capsys.readouterr().out.count("DOES NOT HOLD") == 1
    assert main(["verify", str(run), "--json"]) == 3
    assert json.loads(capsys.readouterr().out)["holds"] is False


def test_verify_with_models_named_anew(run: Path) -> None:
    assert main(["verify", str(run), "--model", "digits-standard", "--model", "digits-robust"]) == 0
    assert main(["verify", str(run), "--model", "digits-robust", "--model", "digits-standard"]) == 3
    assert main(["verify", str(run), "--model", "digits-robust"]) == 2


def test_report_renders_the_page_anew_and_touches_nothing_else(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = (run / "report.html").read_bytes()
    (run / "report.html").unlink()
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    assert main(["report", str(run), "--junit", f"{run}/j.xml"]) == 0
    assert (run / "report.html").read_bytes() == page
    assert {name: (run / name).read_bytes() for name in before} == before
    assert "clean accuracy" in capsys.readouterr().out
    assert ElementTree.parse(run / "j.xml").getroot().tag == "testsuites"
    assert main(["report", str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(before["report.json"])


# list, doctor, help


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert {"pgd", "apgd", "apgd_t", "fgsm", "bim", "mi_fgsm", "noise"} <= {attack["name"] for attack in told["attacks"]}
    assert all(attack["paper"] and attack["summary"] and attack["cost"] for attack in told["attacks"])
    assert {"linf", "l2", "l1", "l0", "l0f"} <= set(told["threats"])
    assert main(["list"]) == 0
    assert "arXiv" in capsys.readouterr().out


def test_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert {"python", "torch", "numpy", "builtin", "device"} <= {one["name"] for one in told}
    assert all(one["sentence"].endswith(".") and one["state"] in ("ok", "missing", "broken") for one in told)
    assert main(["doctor"]) == 0


def test_a_broken_library_is_named_by_doctor_and_hurts_nobody(tmp_path: Path) -> None:
    """A torchvision that does not import, as after a torch upgrade."""
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')\n")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from epsball.cli import main; sys.exit(main(sys.argv[1:]))"
    done = subprocess.run([sys.executable, "-c", code, "doctor", "--json"], capture_output=True, text=True, timeout=120)
    states = {one["name"]: one for one in json.loads(done.stdout)}
    assert states["torchvision"]["state"] == "broken"
    assert "nms does not exist" in states["torchvision"]["sentence"]
    assert done.returncode == 0  # nothing that epsball needs


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    out, err = capsys.readouterr()
    assert "Example" in out
    assert f"epsball {command}" in out
    assert err == ""


def test_help_and_version_do_not_import_torch() -> None:
    code = (
        "import sys\nfrom epsball.cli import main\n"
        f"codes = [main([c, '--help']) for c in {COMMANDS!r}] + [main(['--help']), main(['--version']), main([])]\n"
        "heavy = sorted({'torch', 'numpy', 'scipy', 'sklearn', 'jinja2', 'rich'} & set(sys.modules))\n"
        "sys.exit(f'{codes} {heavy}' if any(codes) or heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_without_arguments_help_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    out, err = capsys.readouterr()
    assert all(command in out for command in COMMANDS)
    assert "Exit codes" in out
    assert out.count("\n") > 10
    assert err == ""


# Ctrl-C


def test_ctrl_c_leaves_a_partial_report_that_can_be_rendered(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    child = process("audit", "digits-robust", "--effort", "max", "-n", "400", "-t", "linf:0.02,0.05,0.1", "-o", str(run))
    assert child.stderr is not None
    for line in child.stderr:
        if "linf 0.02 (" in line:  # the first attack has begun
            child.send_signal(signal.SIGINT)
            break
    out, err = child.communicate(timeout=120)
    assert child.returncode == 130, err
    assert "Traceback" not in err
    assert "interrupted" in out
    report = Report.model_validate_json((run / "report.json").read_bytes())
    assert report.partial
    assert not report.models[0].results[-1].trustworthy
    (run / "report.html").unlink()
    assert main(["report", str(run)]) == 0
    assert "Interrupted" in capsys.readouterr().out
    assert (run / "report.html").stat().st_size > 5000
    assert main(["verify", str(run)]) == 0


def test_ctrl_c_before_anything_is_known_leaves_nothing(files: Path) -> None:
    (files / "slow.py").write_text("import sys, time\n\ndef make():\n    print('ready', file=sys.stderr, flush=True)\n    time.sleep(60)\n")
    child = process("audit", f"{files}/slow.py:make", "-o", f"{files}/run")
    assert child.stderr is not None
    assert child.stderr.readline().strip() == "ready"
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=120)
    assert (child.returncode, out) == (130, "")
    assert err.strip().splitlines() == ["epsball: interrupted before anything was known; nothing was written"]
    assert not (files / "run").exists()
