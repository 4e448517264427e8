"""What a report says of the ladder and of the verdicts: a build's result goes in, Markdown and sentences come out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rdeploy.adapted import Adaptation, Rung
from rdeploy.results import BuildResult

NAMES = {
    "plain": "lower resolution alone",
    "preprocessing": "preprocessing",
    "batchnorm": "BatchNorm statistics",
    "distill": "fine-tuning",
}
_ALIKE = {"cosine": "cosine with native %", "pixels": "pixels as native %", "boxes": "boxes as native %"}


def table(result: BuildResult) -> str:
    """Return the ladder of each place as a Markdown table, with what was not tried below it; empty without one."""
    ladders = _by_place(result)
    with_rungs = {place: one for place, one in ladders.items() if one.rungs}
    parts = []
    if with_rungs:
        metric = next(iter(with_rungs.values())).metric
        heads = (
            "variant",
            "step",
            _ALIKE.get(metric, "agrees with native %"),
            "accuracy %",
            "gain [95 %]",
            "",
            "what",
            "s",
        )
        lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
        lines += [_line(place, rung) for place, one in with_rungs.items() for rung in one.rungs]
        parts.append("\n".join(lines))
    if told := [f"- {place}: {text}" for place, one in ladders.items() for text in _below(one)]:
        parts.append("\n".join(told))
    return "\n\n".join(["## How the lower resolution was made good", *parts]) if parts else ""


def sentences(result: BuildResult) -> list[str]:
    """Return one line for each step of each place's ladder: `r168, preprocessing: 78.4 -> 80.6 % (+2.2 points), kept: ...`."""
    return [
        text
        for place, one in _by_place(result).items()
        for text in told({"rungs": one.rungs, "reason": one.reason}, place)
    ]


def verdicts(result: BuildResult) -> list[str]:
    """Return one line for each variant: `r168-int8: usable: loses 0.4 points ...`."""
    return [
        f"{row.variant.id}: {row.usability.verdict}: {row.usability.reason}"
        for row in result.variants
        if row.usability is not None
    ]


def of_manifest(manifest: Mapping[str, Any]) -> list[str]:
    """Return the same lines of one bundle's manifest: its verdict, and its ladder."""
    variant, found = manifest["variant"], manifest.get("verdict")
    lines = [f"{variant['id']}: {found['verdict']}: {found['reason']}"] if found else []
    ladder = variant.get("adaptation")
    if ladder:
        rungs = [Rung(**{**rung, "gain_ci95": tuple(rung["gain_ci95"])}) for rung in ladder["rungs"]]
        lines += told({"rungs": rungs, "reason": ladder["reason"]}, variant["id"])
    return lines


def told(ladder: Mapping[str, Any], name: str) -> list[str]:
    """Return the ladder's steps after the first as sentences."""
    lines, before = [], None
    for rung in ladder["rungs"]:
        share = _decides(rung)
        if before is not None:
            low, high = rung.gain_ci95
            lines.append(
                f"{name}, {NAMES[rung.step]}: {100 * before:.1f} -> {100 * share:.1f} % ({rung.gain:+.1f} points "
                f"[{low:.1f}, {high:.1f}]), {'kept' if rung.kept else 'dropped'}: {rung.detail}"
            )
        before = share if rung.kept else before
    return lines


def _by_place(result: BuildResult) -> dict[str, Adaptation]:
    """Return each place's ladder once: all its precisions have the same."""
    found: dict[str, Adaptation] = {}
    for row in result.variants:
        if row.adaptation is not None:
            found.setdefault(row.variant.place, row.adaptation)
    return found


def _decides(rung: Rung) -> float:
    return rung.agreement if rung.accuracy is None else rung.accuracy


def _line(place: str, rung: Rung) -> str:
    first = rung.step == "plain"
    low, high = rung.gain_ci95
    cells = (
        place,
        NAMES[rung.step],
        f"{100 * rung.agreement:.1f}",
        "–" if rung.accuracy is None else f"{100 * rung.accuracy:.1f}",
        "" if first else f"{rung.gain:+.1f} [{low:.1f}, {high:.1f}]",
        "" if first else ("kept" if rung.kept else "dropped"),
        rung.detail,
        f"{rung.seconds:.0f}",
    )
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _below(one: Adaptation) -> list[str]:
    lines = []
    if one.rungs:
        native = (
            "" if one.native_accuracy is None else f"; the native model has {100 * one.native_accuracy:.1f} % on these"
        )
        lines.append(f"chosen on {one.chosen_on} images, judged on {one.images} others{native}")
    if one.reason:
        lines.append(f"not tried, or nothing gained: {one.reason}")
    return lines
