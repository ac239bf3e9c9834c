from epsball.auditing.results import Finding, Flag
from epsball.report.view import doubts, headline, lowest, notices, rows, trusted, verdict


def block(message="gradients are zero."):
    return Flag(id="zero-gradient", severity="block", message=message, fix="Use a scale-free loss.")


def test_rows_are_side_by_side_with_gaps_where_a_model_was_not_audited(build):
    first, second = build.model("a", 1.0), build.model("b", 2.0)
    second = second.model_copy(update={"results": list(reversed(second.results))[:2]})
    table = rows(build.report(first, second))
    assert [(row.threat, row.radius_text) for row in table] == [
        ("linf", "0.05"),
        ("linf", "0.1"),
        ("linf", "0.2"),
        ("l2", "0.5"),
        ("l2", "1.0"),
        ("l1", "3"),
    ]
    assert all(row.cells[0] is not None for row in table)
    assert [row.cells[1] is None for row in table] == [True, True, True, True, False, False]


def test_models_of_the_same_name_stay_apart(build):
    table = rows(build.report(build.model("a", 1.0), build.model("a", 3.0)))
    assert table[0].cells[0].robust_accuracy.value < table[0].cells[1].robust_accuracy.value


def test_headline_is_the_middle_radius_of_the_first_threat(build):
    row = headline(build.report())
    assert (row.threat, row.radius_text) == ("linf", "0.1")
    assert headline(build.report(build.model("a", 1.0, results=[]))) is None


def test_distrust_wins_wherever_it_comes_from(build):
    plain = build.model("a", 1.0)
    result = plain.results[0]
    assert trusted(plain, result)
    assert not trusted(plain, result.model_copy(update={"trustworthy": False}))
    assert not trusted(plain, result.model_copy(update={"flags": [block()]}))
    assert not trusted(plain.model_copy(update={"flags": [block()]}), result)
    bad = Finding(id="range", status="block", message="inputs lie outside the box.")
    assert doubts(plain.model_copy(update={"findings": [bad]}), result) == ["inputs lie outside the box."]


def test_verdict_says_the_numbers_of_the_report(build):
    rate = build.rate(0.413).model_copy(update={"low": 0.382, "high": 0.444})
    result = build.result("linf", 8 / 255, "8/255", 0.413, robust_accuracy=rate)
    expected = (
        "At most 41.3 % of inputs (95 % interval 38.2 to 44.4 from 1,000 samples) keep the right answer"
        " when every pixel value may move by 8/255."
    )
    assert verdict(build.model("a", 1.0), result, image=True) == expected
    certified = result.model_copy(update={"certified_accuracy": 0.25})
    assert verdict(build.model("a", 1.0), certified, image=True) == expected + " At least 25.0 % provably do."


def test_verdict_without_trust_holds_no_robust_accuracy(build):
    result = build.result("linf", 0.1, "0.1", 0.873, trustworthy=False, flags=[block()])
    said = verdict(build.model("a", 1.0), result, image=True)
    assert said == "Not trustworthy yet: gradients are zero. Use a scale-free loss."
    assert verdict(build.model("a", 1.0), None, image=True) == "Not audited under this threat."


def test_lowest_ignores_untrusted_results(build):
    low = build.result("linf", 0.1, "0.1", 0.1, trustworthy=False)
    high = build.result("linf", 0.2, "0.2", 0.4)
    assert lowest(build.model("a", 1.0, results=[low, high])) is high
    assert lowest(build.model("a", 1.0, results=[low])) is None


def test_a_flag_raised_alike_at_several_radii_is_told_once_and_blocks_come_first(build):
    warn = Flag(id="still-improving", severity="warn", message="more steps help.")
    results = [build.result("linf", r, str(r), 0.5, flags=[warn]) for r in (0.1, 0.2)]
    found = notices(build.model("a", 1.0, results=results, flags=[block()]))
    assert [(n.flag.id, n.where) for n in found] == [("zero-gradient", ""), ("still-improving", "linf 0.1, linf 0.2")]
