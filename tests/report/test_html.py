import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest

from epsball.auditing.results import ClassRate, Finding, Flag
from epsball.errors import BadInput
from epsball.report import render, write

VOID = {"meta", "img"}


class Page(HTMLParser):
    """Collects elements and text, and checks that tags nest."""

    def __init__(self, source):
        super().__init__(convert_charrefs=True)
        self.tags, self.words, self.open = [], [], []
        self.feed(source)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not self.open or self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self):
        return re.sub(r"\s+", " ", " ".join(self.words)).replace("  ", " ")

    def of(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]


def check_inert(page, source):
    allowed = {"html", "head", "meta", "title", "style", "body", "main", "header", "section", "article", "div", "p", "span", "b", "strong"}
    allowed |= {"small", "h1", "h2", "h3", "h4", "ul", "li", "dl", "dt", "dd", "pre", "code", "details", "summary", "figure", "figcaption"}
    allowed |= {"table", "caption", "thead", "tbody", "tr", "th", "td", "img"}
    allowed |= {"svg", "desc", "g", "text", "line", "rect", "circle", "polygon", "polyline"}
    assert {tag for tag, _ in page.tags} <= allowed
    for _, attrs in page.tags:
        assert not [name for name in attrs if name.startswith("on") or name in {"style", "href", "action", "formaction", "srcset"}]
        assert attrs.get("src", "data:image/png;base64,").startswith("data:image/png;base64,")
    assert "url(" not in source.split("</style>")[0]
    assert "@import" not in source.split("</style>")[0]
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\u202a-\u202e\u2066-\u2069\ufeff\ud800-\udfff]", source)


def test_hostile_strings_are_inert(build, tmp_path):
    source = render(build.hostile(), build.evidence(tmp_path / "e.safetensors"))
    page = Page(source)
    check_inert(page, source)
    assert "<script" not in source.lower()
    assert "{{ 7*7 }}" in page.text
    assert "[bold red]b[/bold red]" in page.text


def test_a_plain_report_is_inert_too_and_has_a_strict_policy(build, tmp_path):
    source = render(build.report(), build.evidence(tmp_path / "e.safetensors"))
    page = Page(source)
    check_inert(page, source)
    policy = next(meta["content"] for meta in page.of("meta") if meta.get("http-equiv") == "Content-Security-Policy")
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    assert source.index("Content-Security-Policy") < source.index("<style>")


def test_the_page_shows_the_numbers_of_the_report(build, tmp_path):
    report = build.report()
    text = Page(render(report, None)).text
    for model in report.models:
        assert model.name in text
        for result in model.results:
            rate = result.robust_accuracy
            assert f"{100 * rate.value:.1f} % [{100 * rate.low:.1f}, {100 * rate.high:.1f}]" in text
    spoken = report.models[0].results[1].robust_accuracy
    assert f"At most {100 * spoken.value:.1f} % of inputs" in re.sub(" +", " ", text)
    for fact in ("epsball audit --seed 7", "2.13.0", "runs/first", "2026-03-01T12:00:00Z", "apgd-ce", "65,000", "upper bound"):
        assert fact in text


def test_order_of_the_page(build):
    headings = re.findall(r"<h2>([A-Z][^<]*)</h2>", render(build.report(), None))
    assert headings == [
        "Results side by side",
        "Accuracy against radius",
        "Per class",
        "What broke it",
        "What these numbers mean",
        "Doubts and checks",
        "Attacks that ran",
        "How to repeat this",
    ]


def test_an_untrusted_number_is_nowhere_in_words(build):
    flag = Flag(id="zero-gradient", severity="block", message="gradients are zero.", fix="Use a scale-free loss.")
    result = build.result("linf", 0.1, "0.1", 0.873, trustworthy=False, flags=[flag], per_class=[])
    source = render(build.report(build.model("a", 1.0, results=[result])), None)
    text = Page(source).text
    assert "87.3" not in source
    assert "Not trustworthy yet" in text
    assert "not trustworthy yet" in text
    assert text.count("Use a scale-free loss.") >= 2


def test_flags_findings_and_gaps_are_told(build):
    findings = [Finding(id="range", status="pass", message="inside the box."), Finding(id="eval", status="mended", message="was training.")]
    warn = Flag(id="still-improving", severity="warn", message="more steps help.", fix="Use --effort max.")
    first = build.model("a", 1.0, findings=findings, flags=[warn], invalid=2)
    second = build.model("b", 1.0, results=first.results[:1])
    text = Page(render(build.report(first, second, partial=True), None)).text
    for fact in (
        "was training.",
        "inside the box.",
        "more steps help.",
        "Use --effort max.",
        "not audited",
        "Interrupted.",
        "2 samples gave NaN",
    ):
        assert fact in text


def test_certified_accuracy_and_rounding_are_shown_where_known(build):
    result = build.result("linf", 0.1, "0.1", 0.5, certified_accuracy=0.3, after_rounding=build.rate(0.52))
    text = Page(render(build.report(build.model("a", 1.0, results=[result])), None)).text
    assert "certified at least 30.0 %" in text
    assert "52.0 % after rounding to 8 bits" in text
    assert "a lower bound" in text
    assert "certified at least" not in Page(render(build.report(), None)).text


def test_few_samples_and_many_classes_are_said(build):
    text = Page(render(build.report(), None)).text
    assert "too few: 12" in text
    many = [ClassRate(label=i, name=str(i), rate=build.rate(i / 100, 50)) for i in range(100)]
    result = build.result("linf", 0.1, "0.1", 0.5, per_class=many)
    text = Page(render(build.report(build.model("a", 1.0, results=[result])), None)).text
    assert "The 20 weakest classes; the other 80 are in report.json." in text


def test_figures_and_tables_speak_to_screen_readers(build, tmp_path):
    page = Page(render(build.report(), build.evidence(tmp_path / "e.safetensors")))
    idents = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(idents) == len(set(idents))
    for drawing in page.of("svg"):
        assert drawing.get("aria-hidden") == "true" or set(drawing["aria-labelledby"].split()) <= set(idents)
    assert all(image["alt"] for image in page.of("img"))
    assert all(cell.get("scope") for cell in page.of("th"))
    assert page.of("html")[0]["lang"] == "en"
    assert [tag for tag, _ in page.tags].count("h1") == 1


def test_pixels_are_said_only_when_the_inputs_are_images(build, tmp_path):
    image = build.evidence(tmp_path / "a.safetensors")
    flat = build.evidence(tmp_path / "b.safetensors", shape=(64,))
    assert "every pixel value may move" in render(build.report(), image)
    for source in (render(build.report(), flat), render(build.report(), None)):
        assert "every pixel value" not in source
        assert "every input value may move" in source


@pytest.mark.parametrize("count", [0, 1, 7])
def test_any_number_of_models_renders(build, count):
    report = build.report().model_copy(update={"models": [build.model(f"m{i}", 1.0 + i) for i in range(count)]})
    source = render(report, None)
    check_inert(Page(source), source)


def test_a_model_without_results_renders(build):
    assert "No threat was audited" in render(build.report(build.model("a", 1.0, results=[])), None)


def test_the_same_inputs_give_the_same_bytes(build, tmp_path):
    evidence = build.evidence(tmp_path / "e.safetensors")
    write(build.report(), evidence, tmp_path / "a.html")
    write(build.report(), evidence, tmp_path / "b.html")
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()
    with pytest.raises(BadInput, match="cannot write"):
        write(build.report(), evidence, tmp_path / "none" / "a.html")


def test_reports_are_read_without_torch(tmp_path):
    code = (
        "import sys, epsball.report; from epsball.auditing.results import Report; from pathlib import Path\n"
        "assert not {'torch', 'rich', 'jinja2', 'PIL'} & set(sys.modules), 'imported too early'\n"
        "r = Report(models=[], seed=0, run='r'); epsball.report.render(r, None); epsball.report.summary(r)\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
