"""Plain audit results, shown: in the terminal, as one HTML page, as JSON, JUnit XML and SARIF. No model is touched here.

Everything reads `epsball.auditing.results.Report` and, for the picture gallery, the evidence file; importing this never
imports torch, and jinja2, rich and Pillow only when something is rendered.
"""

from __future__ import annotations

from epsball.report.files import junit, read_json, write_json
from epsball.report.html import render, write
from epsball.report.sarif import sarif
from epsball.report.terminal import summary
from epsball.report.text import clean

__all__ = ["clean", "junit", "read_json", "render", "sarif", "summary", "write", "write_json"]
