"""The page in a real browser: it opens, it asks the network for nothing, nothing spills over the edge."""

import json
import shutil
import subprocess

import pytest

from epsball.report import write

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
# The browser's own services look for the outside world; names resolve to nothing so that none is reached.
FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--host-resolver-rules=MAP * ~NOTFOUND"),
]
pytestmark = [pytest.mark.browser, pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the path")]


def browse(tmp_path, page, *flags):
    log = tmp_path / "net.json"
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", f"--log-net-log={log}", *flags, page.as_uri()]
    done = subprocess.run(command, capture_output=True, timeout=120, check=True)
    return done.stdout.decode("utf-8"), requests(log)


def requests(log):
    """URLs that the page itself asked for: those isolated under its file: origin."""
    record = json.loads(log.read_text())
    start = record["constants"]["logEventTypes"]["URL_REQUEST_START_JOB"]
    jobs = [event["params"] for event in record["events"] if event["type"] == start and "params" in event]
    return [job["url"] for job in jobs if "url" in job and "file://" in job.get("network_isolation_key", "")]


@pytest.mark.parametrize("kind", ["plain", "hostile"])
def test_the_page_opens_and_asks_for_nothing(build, tmp_path, kind):
    page = tmp_path / "report.html"
    write(build.report() if kind == "plain" else build.hostile(), build.evidence(tmp_path / "e.safetensors"), page)
    dom, asked = browse(tmp_path, page, "--dump-dom")
    assert "<title>How robust are these two models, really?" in dom
    assert "<script" not in dom.lower()
    assert [url for url in asked if not url.startswith("data:")] == []


def test_the_check_itself_sees_requests(tmp_path):
    page = tmp_path / "probe.html"
    page.write_text('<title>probe</title><img src="http://probe.invalid/x.png">')
    assert browse(tmp_path, page, "--dump-dom")[1] == ["http://probe.invalid/x.png"]


@pytest.mark.parametrize("width", [500, 1200])
def test_the_page_draws(build, tmp_path, width):
    from PIL import Image

    page, shot = tmp_path / "report.html", tmp_path / "shot.png"
    write(build.report(), build.evidence(tmp_path / "e.safetensors"), page)
    browse(tmp_path, page, f"--window-size={width},1500", f"--screenshot={shot}")
    with Image.open(shot) as picture:
        assert picture.size == (width, 1500)
        colors = picture.convert("RGB").getcolors(1 << 20)
        assert len(colors) > 50
        # Content must end before the right edge: the last columns are bare paper.
        edge = picture.convert("RGB").crop((width - 8, 0, width, 1500)).getcolors(1 << 16)
        assert len(edge) == 1
