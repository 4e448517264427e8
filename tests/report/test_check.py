"""The gate's result as Markdown, annotations and JUnit XML, for every verdict."""

from xml.etree import ElementTree

import pytest

from rdeploy.report import check
from rdeploy.verdicts import CheckResult, Finding

FINDINGS = (
    Finding(metric="macs", verdict="pass", baseline=2e6, current=2e6, change=0.0, interval=(0.0, 0.0), budget=0.0),
    Finding(
        metric="latency",
        verdict="regression",
        backend="onnxruntime",
        baseline=1.0,
        current=1.1,
        change=0.1,
        interval=(0.08, 0.12),
        budget=0.05,
        basis="6 launches side by side",
    ),
    Finding(
        metric="accuracy",
        verdict="inconclusive",
        backend="onnxruntime",
        baseline=0.9,
        current=0.9,
        change=0.0,
        interval=(-0.02, 0.02),
        budget=0.01,
        reason="about 70 more images would settle it",
        needed=70,
    ),
    Finding(metric="size", verdict="improvement", backend="a|b", baseline=2e6, current=1e6, change=-0.5, budget=0.01),
    Finding(metric="memory", verdict="not comparable", backend="openvino", reason="another machine: cpu a, b"),
)


def result(findings=FINDINGS, verdict="regression", **facts):
    return CheckResult(
        verdict=verdict,
        current="net r6",
        baseline="net r6 of 2026",
        findings=findings,
        update="rdeploy check b",
        **facts,
    )


def test_what_needs_attention_comes_first():
    assert [row.verdict for row in check.rows(result())] == [
        "regression", "inconclusive", "improvement", "not comparable", "pass",
    ]  # fmt: skip


def test_the_headline_counts_the_verdicts():
    expected = (
        "regression: net r6 against net r6 of 2026 "
        "(1 regression, 1 inconclusive, 1 improvement, 1 not comparable, 1 pass)"
    )

    assert check.headline(result()) == expected
    assert check.headline(result((), "inconclusive")).endswith("(nothing to compare)")


def test_the_same_reason_is_said_once():
    same = tuple(
        Finding(metric=m, verdict="inconclusive", backend="x", reason="too few") for m in ("latency", "memory")
    )

    assert check.reasons(check.rows(result(same))) == ("latency on x, memory on x: too few",)
    assert check.reasons(check.rows(result((FINDINGS[0],)))) == ()


def test_values_have_their_units():
    rows = {row.metric: row for row in check.rows(result())}

    assert (rows["latency"].baseline, rows["latency"].current) == ("1 ms", "1.1 ms")
    assert (rows["latency"].change, rows["latency"].budget) == ("+10.0 % [+8.0, +12.0]", "5 %")
    assert (rows["accuracy"].change, rows["accuracy"].budget) == ("+0.0 points [-2.0, +2.0]", "1 points")
    assert (rows["size"].current, rows["size"].change, rows["macs"].change) == ("1 MB", "-50.00 %", "none")
    assert (rows["macs"].current, rows["memory"].current) == ("2 MMACs", "–")


def test_markdown_shows_what_needs_attention_and_folds_the_rest():
    text = check.markdown(result(launches={"onnxruntime": 9}))

    before, _, after = text.partition("<details><summary>2 more</summary>")
    assert text.startswith("### rdeploy check: ❌ regression: net r6 against net r6 of 2026")
    assert "| ❌ regression | latency | onnxruntime | 1 ms | 1.1 ms | +10.0 % [+8.0, +12.0] | 5 % |" in before
    assert "a\\|b" in before
    assert "not comparable" in after
    assert "Intervals hold with 99 % confidence each. Launches measured side by side: onnxruntime: 9." in after


def test_markdown_cannot_be_broken_by_a_name():
    text = check.markdown(result((Finding(metric="size", verdict="regression", backend="<b>\n`x`"),)))

    assert "&lt;b> \\`x\\`" in text


def test_an_improvement_asks_for_the_baseline_to_be_updated():
    better = result((FINDINGS[3],), "improvement", notes=("other software: x 1 -> 2",))

    assert check.advice(better) == (
        "other software: x 1 -> 2",
        "it got better; make it the baseline with: rdeploy check b",
    )
    assert check.advice(result()) == ("if that is intended, make it the baseline with: rdeploy check b",)
    assert check.advice(result((FINDINGS[0],), "pass")) == ()


def test_annotations_are_escaped_workflow_commands():
    assert check.github_annotations(result()) == (
        "::error title=rdeploy check%3A regression::latency on onnxruntime: 1 ms -> 1.1 ms, +10.0 %25 [+8.0, +12.0], "
        "budget 5 %25; 6 launches side by side",
        "::warning title=rdeploy check%3A inconclusive::accuracy on onnxruntime: 90.0 %25 -> 90.0 %25, "
        "+0.0 points [-2.0, +2.0], budget 1 points; about 70 more images would settle it",
        "::notice title=rdeploy check%3A improvement::size on a|b: 2 MB -> 1 MB, -50.00 %25, budget 1 %25",
    )


@pytest.mark.parametrize(
    ("name", "child"),
    [
        ("latency (onnxruntime)", "failure"),
        ("accuracy (onnxruntime)", "skipped"),
        ("memory (openvino)", "skipped"),
        ("size (a|b)", "system-out"),
        ("macs", "system-out"),
    ],
)
def test_junit_fails_for_a_regression_only(name, child):
    suite = ElementTree.fromstring(check.junit(result()).encode())

    (case,) = [case for case in suite if case.get("name") == name]

    assert [part.tag for part in case] == [child]
    assert (suite.get("tests"), suite.get("failures"), suite.get("skipped")) == ("5", "1", "2")
