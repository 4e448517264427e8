"""The page of a GPU check: what was measured, by network and by row, and which rows were not, with the reason."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

Found = dict[str, Any]
NOT_REACHED = "not reached yet: run it again"


@dataclasses.dataclass(frozen=True)
class Row:
    """One cell of the check."""

    network: str
    size: int
    batch: int
    precision: str
    runtime: str

    @property
    def key(self) -> str:
        return f"{self.network}/{self.size}/{self.batch}/{self.precision}/{self.runtime}"


def page(results: dict[str, Any], device: str, rows: Sequence[Row]) -> str:
    """Return the Markdown page of a device."""
    facts, found = results["environment"], results["rows"]
    measured = [row for row in rows if "p50_ms" in found.get(row.key, {})]
    lines = [
        f"# GPU check: {device}",
        "",
        f"Driver {facts.get('driver')}, {facts.get('os')}, Python {facts.get('python')}; {results['date']}. "
        "Written by `benchmarks/gpu_check.py`; latency is the median of 200 runs on random weights.",
        "",
        f"- tests marked gpu: {results['tests']}",
        f"- rows measured: {len(measured)} of {len(rows)}",
    ]
    if measured:
        lines += ["", "## Latency, p50 ms", "", *_matrix(measured, found), "", "## Rows", "", *_table(measured, found)]
    missing = [row for row in rows if row not in measured]
    if missing:
        lines += ["", "## Not measured", "", *_reasons(missing, found)]
    return "\n".join(lines) + "\n"


def _matrix(measured: Sequence[Row], found: dict[str, Found]) -> list[str]:
    """Return a line for each network, size and batch, a column for each runtime in each precision that was measured."""
    columns = list(dict.fromkeys((row.runtime, row.precision) for row in measured))
    places = list(dict.fromkeys((row.batch, row.network, row.size) for row in measured))
    values = {row: found[row.key] for row in measured}
    lines = [
        f"| network | size | batch | {' | '.join(f'{runtime} {precision}' for runtime, precision in columns)} |",
        f"|---|---|---|{'---|' * len(columns)}",
    ]
    for batch, network, size in places:
        cells = [values.get(Row(network, size, batch, precision, runtime)) for runtime, precision in columns]
        real = next(cell.get("size", size) for cell in cells if cell is not None)
        texts = ["" if cell is None else f"{cell['p50_ms']:.3f}{'*' * bool(cell['doubts'])}" for cell in cells]
        lines.append(f"| {network} | {real} | {batch} | {' | '.join(texts)} |")
    if any(value["doubts"] for value in values.values()):
        lines += ["", "\\* is doubtful: see its row."]
    return lines


def _table(measured: Sequence[Row], found: dict[str, Found]) -> list[str]:
    return [
        "| network | size | batch | precision | runtime | p50 ms | by hand | back to back | MB ran | dB | note |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
        *(line(row, found[row.key]) for row in measured),
    ]


def line(row: Row, found: Found) -> str:
    """Return the table's line of one row."""
    cells = [row.network, str(found.get("size", row.size)), str(row.batch), row.precision, row.runtime]
    if "p50_ms" not in found:
        return f"| {' | '.join(cells)} | not measured: {found['not_measured'].replace('|', '/')} |"
    by_hand = f"{100 * found['timers_differ']:+.1f} %" if "timers_differ" in found else "none"
    busy = f"{found['back_to_back_ms']:.3f}" if "back_to_back_ms" in found else ""
    memory = f"{found['memory']['ran'] / 1e6:.0f}" if "memory" in found else ""
    decibel = f"{found['sqnr_db']:.1f}" if found.get("sqnr_db") is not None else ""
    bench = f"do_bench {found['do_bench_ms']:.3f} ms" if "do_bench_ms" in found else ""
    note = "; ".join(filter(None, [found.get("clock", ""), bench, *found["doubts"]]))
    cells += [f"{found['p50_ms']:.3f}", by_hand, busy, memory, decibel, note]
    return f"| {' | '.join(cells)} |"


def _reasons(missing: Sequence[Row], found: dict[str, Found]) -> list[str]:
    """Return every reason with its rows; a reason of all rows names none."""
    by_reason: dict[str, list[Row]] = {}
    for row in missing:
        reason = found.get(row.key, {}).get("not_measured", NOT_REACHED)
        by_reason.setdefault(" ".join(reason.split()), []).append(row)
    lines = []
    for reason, concerned in by_reason.items():
        names = "" if len(by_reason) == 1 else f": {', '.join(row.key for row in concerned)}"
        lines.append(f"- {len(concerned)} rows, {reason}{names}")
    return lines


def count(results: dict[str, Any]) -> int:
    """Return how many rows were measured."""
    return sum("p50_ms" in found for found in results["rows"].values())
