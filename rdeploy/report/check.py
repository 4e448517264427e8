"""The gate's result goes in; a pull request's Markdown, GitHub's annotations and JUnit XML come out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from xml.etree import ElementTree

from rdeploy.evidence import SHARES
from rdeploy.verdicts import IMPROVEMENT, INCONCLUSIVE, NOT_COMPARABLE, PASS, REGRESSION, CheckResult, Finding

_NONE = "–"
_MARKS = {PASS: "✅", REGRESSION: "❌", IMPROVEMENT: "🎉", INCONCLUSIVE: "❔", NOT_COMPARABLE: "➖"}
_ORDER = (REGRESSION, INCONCLUSIVE, IMPROVEMENT, NOT_COMPARABLE, PASS)
_LEVELS = {REGRESSION: "error", INCONCLUSIVE: "warning", IMPROVEMENT: "notice"}
_UNITS = {
    "latency": ("ms", 1.0),
    "throughput": ("images/s", 1.0),
    "build_time": ("s", 1.0),
    "speedup": ("x", 1.0),
    "memory_ratio": ("x", 1.0),
    "memory": ("MB", 1e-6),
    "size": ("MB", 1e-6),
    "weight_bytes": ("MB", 1e-6),
    "activation_bytes": ("MB", 1e-6),
    "onnx_bytes": ("MB", 1e-6),
    "macs": ("MMACs", 1e-6),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One finding as text."""

    verdict: str
    metric: str
    backend: str
    baseline: str = _NONE
    current: str = _NONE
    change: str = _NONE
    budget: str = _NONE
    why: str = ""


def rows(result: CheckResult) -> tuple[Row, ...]:
    """Return the findings as text, what needs attention first."""
    ordered = sorted(result.findings, key=lambda one: _ORDER.index(one.verdict))
    return tuple(_row(one) for one in ordered)


def headline(result: CheckResult) -> str:
    """Return the verdict with how many findings there are of each kind, in one line."""
    counts = {name: sum(one.verdict == name for one in result.findings) for name in _ORDER}
    told = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
    return f"{result.verdict}: {result.current} against {result.baseline} ({told or 'nothing to compare'})"


def advice(result: CheckResult) -> tuple[str, ...]:
    """Return what is to be known or done: other machine, other software, a baseline to be updated."""
    better = any(one.verdict == IMPROVEMENT for one in result.findings)
    worse = any(one.verdict == REGRESSION for one in result.findings)
    if better and not worse:
        return (*result.notes, f"it got better; make it the baseline with: {result.update}")
    if worse:
        return (*result.notes, f"if that is intended, make it the baseline with: {result.update}")
    return result.notes


def markdown(result: CheckResult) -> str:
    """Return the comment for a pull request: the verdict, the table, what needs attention, and the rest folded away."""
    table = rows(result)
    attention = [row for row in table if row.verdict in _LEVELS]
    rest = [row for row in table if row.verdict not in _LEVELS]
    parts = [f"### rdeploy check: {_MARKS[result.verdict]} {_cell(headline(result))}"]
    if attention:
        parts.append(_table(attention))
    parts += [f"- {_cell(line)}" if not line.startswith("it got") else f"- {line}" for line in advice(result)]
    if rest:
        parts.append(f"<details><summary>{len(rest)} more</summary>\n\n{_table(rest)}\n\n</details>")
    launches = ", ".join(f"{backend}: {count}" for backend, count in result.launches.items())
    measured = f" Launches measured side by side: {launches}." if launches else ""
    parts.append(f"Intervals hold with {100 * result.confidence:g} % confidence each.{measured}")
    return "\n\n".join(parts) + "\n"


def github_annotations(result: CheckResult) -> tuple[str, ...]:
    """Return GitHub's workflow commands: an error for a regression, a warning for what is inconclusive."""
    lines = []
    for row in rows(result):
        if level := _LEVELS.get(row.verdict):
            title = _property(f"rdeploy check: {row.verdict}")
            lines.append(f"::{level} title={title}::{_data(sentence(row))}")
    return tuple(lines)


def reasons(found: Sequence[Row]) -> tuple[str, ...]:
    """Return why the findings that did not simply pass are what they are, those with the same reason in one line."""
    names: dict[str, list[str]] = {}
    for row in found:
        if row.verdict != PASS and row.why:
            names.setdefault(row.why, []).append(
                row.metric if row.backend == _NONE else f"{row.metric} on {row.backend}"
            )
    return tuple(f"{', '.join(who)}: {why}" for why, who in names.items())


def sentence(row: Row) -> str:
    """Return a finding as one line."""
    name = row.metric if row.backend == _NONE else f"{row.metric} on {row.backend}"
    change = f"{row.baseline} -> {row.current}, {row.change}, budget {row.budget}" if row.change != _NONE else ""
    return ": ".join((name, "; ".join(part for part in (change, row.why) if part)))


def junit(result: CheckResult) -> str:
    """Return JUnit XML: a test case a finding; regressions fail, what is inconclusive or not comparable is skipped."""
    found = [one.verdict for one in result.findings]
    suite = ElementTree.Element(
        "testsuite",
        name=f"rdeploy check {result.current}",
        tests=str(len(found)),
        failures=str(found.count(REGRESSION)),
        errors="0",
        skipped=str(found.count(INCONCLUSIVE) + found.count(NOT_COMPARABLE)),
    )
    for row in rows(result):
        name = row.metric if row.backend == _NONE else f"{row.metric} ({row.backend})"
        case = ElementTree.SubElement(suite, "testcase", classname="rdeploy.check", name=name, time="0")
        if row.verdict == REGRESSION:
            ElementTree.SubElement(case, "failure", message=sentence(row), type=REGRESSION)
        elif row.verdict in (INCONCLUSIVE, NOT_COMPARABLE):
            ElementTree.SubElement(case, "skipped", message=f"{row.verdict}: {sentence(row)}")
        else:
            ElementTree.SubElement(case, "system-out").text = f"{row.verdict}: {sentence(row)}"
    ElementTree.indent(suite)
    return ElementTree.tostring(suite, encoding="unicode", xml_declaration=True) + "\n"


def _row(one: Finding) -> Row:
    return Row(
        verdict=one.verdict,
        metric=one.metric,
        backend=one.backend or _NONE,
        baseline=_value(one.metric, one.baseline),
        current=_value(one.metric, one.current),
        change=_change(one),
        budget=_NONE if one.budget is None else f"{100 * one.budget:g} {_percent(one.metric)}",
        why="; ".join(part for part in (one.reason, one.basis) if part),
    )


def _value(metric: str, value: float | None) -> str:
    if value is None:
        return _NONE
    if metric in SHARES:
        return f"{100 * value:.1f} %"
    unit, factor = _UNITS.get(metric, ("", 1.0))
    number = f"{value:g}" if not unit and value == int(value) else f"{value * factor:.4g}"
    return f"{number} {unit}".strip()


def _change(one: Finding) -> str:
    if one.change is None:
        return _NONE
    unit = _percent(one.metric)
    if one.interval is None or one.interval[0] == one.interval[1]:
        return f"{100 * one.change:+.2f} {unit}" if one.change else "none"
    low, high = (100 * bound for bound in one.interval)
    return f"{100 * one.change:+.1f} {unit} [{low:+.1f}, {high:+.1f}]"


def _percent(metric: str) -> str:
    return "points" if metric in SHARES else "%"


def _table(table: list[Row]) -> str:
    lines = ["| | metric | engine | baseline | current | change | budget | |", "|---|---|---|---|---|---|---|---|"]
    for row in table:
        cells = (f"{_MARKS[row.verdict]} {row.verdict}", row.metric, row.backend, row.baseline, row.current)
        lines.append("| " + " | ".join(map(_cell, (*cells, row.change, row.budget, row.why))) + " |")
    return "\n".join(lines)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;").replace("`", "\\`")


def _data(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")
