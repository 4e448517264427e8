"""The tables of `rdeploy profile`: measured engines go in, titles with rich tables and lines of warning come out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import median

from rich.table import Table

from rdeploy import measure
from rdeploy.measured import WALL_CLOCK, LayerTimes, Measurement
from rdeploy.results import EngineResult

_ROWS = 15
"""How many layers are shown; the JSON has all."""
_NONE = "–"


def tables(found: Sequence[EngineResult]) -> Iterator[tuple[str, Table]]:
    """Yield a title (empty for the first) and a table for everything that was measured; all of `found` has been."""
    yield "", _latency(found)
    if any(one.throughput for _, one in _each(found)):
        yield "Throughput, sessions side by side", _throughput(found)
    if any(one.paced for _, one in _each(found)):
        yield "At a camera's pace (idle cost is against back to back)", _paced(found)
    if any(one.end_to_end for _, one in _each(found)):
        yield "From the image file to the answer, median ms", _end_to_end(found)
    if any(one.energy and one.energy.joules_per_run is not None for _, one in _each(found)):
        yield "Energy of a run", _energy(found)
    if any(one.scenarios for _, one in _each(found)):
        yield "MLPerf's load generator (no official result)", _scenarios(found)
    if any(one.layers for _, one in _each(found)):
        yield "Times by layer, ms", _layers([(name, one.layers) for name, one in _each(found) if one.layers])


def remarks(found: Sequence[EngineResult]) -> list[str]:
    """Return what makes the numbers doubtful and what could not be had, each once."""
    lines = [
        f"rdeploy profile: the machine was not fit to measure on: {why}" for _, one in _each(found) for why in one.unfit
    ]
    for name, one in _each(found):
        said = measure.summary(one.latencies_ms)["warnings"]
        unsettled = () if one.stable else ("the latency did not settle",)
        energy = one.energy
        no_meter = (
            (energy.method,) if energy and energy.joules_per_run is None and _is_worth_saying(energy.method) else ()
        )
        other = () if one.definition == WALL_CLOCK else (f"not comparable with the others: {one.definition}",)
        lines += [f"rdeploy profile: {name}: {text}" for text in (*other, *said, *unsettled, *no_meter, *one.notes)]
    return list(dict.fromkeys(lines))


def _is_worth_saying(reason: str) -> bool:
    """Most machines have no meter at all; one that is there and may not be read is news."""
    return not reason.startswith("no meter")


def _latency(found: Sequence[EngineResult]) -> Table:
    table = _table(
        "engine", "p50 ms", "p90 ms", "p99 ms", "mean ms", "cov %", "images/s", "peak MB", "size MB", "runs", left=1
    )
    table.add_column("")
    knees = _knees(found)
    for engine in found:
        one = engine.measurement
        if one is None:
            continue
        values = measure.summary(one.latencies_ms, batch=one.batch)
        size = engine.engine.size_bytes if engine.engine else None
        marks = ["unfit"] * bool(one.unfit) + ["unsteady"] * (not one.stable or values["modes"] is not None)
        marks += ["knee"] * (knees.get(engine.backend) == one.batch)
        table.add_row(
            _name(engine, found),
            *(_text(values[name]) for name in ("p50_ms", "p90_ms", "p99_ms", "mean_ms")),
            _text(None if values["cov"] is None else 100 * values["cov"], 1),
            _text(values["throughput_ips"], 1),
            *(_text(None if size is None else size / 1e6, 1) for size in (one.memory.process_peak, size)),
            str(values["samples"]),
            ", ".join(marks),
        )
    return table


def _knees(found: Sequence[EngineResult]) -> dict[str, int | None]:
    points: dict[str, list[tuple[int, float]]] = {}
    for engine, one in ((engine, engine.measurement) for engine in found):
        if one is not None:
            rate = measure.summary(one.latencies_ms, batch=one.batch)["throughput_ips"]
            points.setdefault(engine.backend, []).append((one.batch, rate or 0.0))
    return {backend: measure.knee(rates) for backend, rates in points.items()}


def _throughput(found: Sequence[EngineResult]) -> Table:
    table = _table("engine", "streams", "threads each", "images/s", "p50 ms", "runs", left=1)
    for name, one in _each(found):
        for row in one.throughput:
            threads = _NONE if row.threads is None else str(row.threads)
            table.add_row(name, str(row.streams), threads, _text(row.images_per_s, 1), _text(row.p50_ms), str(row.runs))
    return table


def _paced(found: Sequence[EngineResult]) -> Table:
    table = _table("engine", "fps", "paced p50 ms", "back to back p50 ms", "idle cost [95 %]", "late frames", left=1)
    for name, one in _each(found):
        if (paced := one.paced) is not None:
            low, high = paced.idle_cost_ci95
            cost = f"{paced.idle_cost:.2f}x {paced.verdict} [{low:.2f}, {high:.2f}]"
            medians = (_text(median(values)) for values in (paced.paced_ms, paced.back_to_back_ms))
            table.add_row(name, f"{paced.fps:g}", *medians, cost, f"{paced.late} of {len(paced.paced_ms)}")
    return table


def _end_to_end(found: Sequence[EngineResult]) -> Table:
    table = _table("engine", "decode", "preprocess", "inference", "of which up", "down", "whole", "images", left=1)
    for name, one in _each(found):
        if (stages := one.end_to_end) is not None:
            parts = (stages.decode_ms, stages.preprocess_ms, stages.inference_ms)
            shown = (*parts, stages.upload_ms, stages.download_ms, [sum(row) for row in zip(*parts, strict=True)])
            table.add_row(name, *(_text(median(values) if values else None) for values in shown), str(stages.images))
    return table


def _energy(found: Sequence[EngineResult]) -> Table:
    table = _table("engine", "mJ a run", "watts", "idle watts", left=1)
    table.add_column("meter")
    for name, one in _each(found):
        if (energy := one.energy) is not None and energy.joules_per_run is not None:
            watts = (_text(energy.watts, 1), _text(energy.idle_watts, 1))
            table.add_row(name, _text(1000 * energy.joules_per_run, 1), *watts, energy.method)
    return table


def _scenarios(found: Sequence[EngineResult]) -> Table:
    table = _table("engine", "scenario", "", "value", left=3)
    table.add_column("")
    for name, one in _each(found):
        for row in one.scenarios:
            table.add_row(name, row.scenario, row.metric, _text(row.value), "" if row.valid else "INVALID")
    return table


def _layers(found: Sequence[tuple[str, LayerTimes]]) -> Table:
    """Return a row for every layer of the model, the slowest first, and a column for every runtime; they sum to the whole.

    What a runtime fused is in the row of its main layer; what it added itself (changes of layout) is in a row of its kind.
    """
    table = _table("layer", *(name for name, _ in found), left=1)
    columns = [by_layer(times) for _, times in found]
    totals = {layer: max(column.get(layer, 0.0) for column in columns) for column in columns for layer in column}
    order = sorted(totals, key=lambda layer: -totals[layer])
    for layer in order[:_ROWS]:
        table.add_row(layer, *(_text(column.get(layer)) for column in columns))
    if rest := order[_ROWS:]:
        table.add_row(f"({len(rest)} more)", *(_text(sum(c.get(layer, 0.0) for layer in rest)) for c in columns))
    table.add_row("(remainder)", *(_text(times.remainder_ms) for _, times in found))
    table.add_row("whole", *(_text(times.whole_ms) for _, times in found), style="bold")
    return table


def by_layer(times: LayerTimes) -> dict[str, float]:
    """Return milliseconds by the model's layers; what covers none of them by its kind, in brackets."""
    found: dict[str, float] = {}
    for kernel in times.kernels:
        layer = kernel.layers[0] if kernel.layers else f"({kernel.kind or kernel.name})"
        found[layer] = found.get(layer, 0.0) + kernel.mean_ms
    return found


def _each(found: Sequence[EngineResult]) -> Iterator[tuple[str, Measurement]]:
    for one in found:
        if one.measurement is not None:
            yield _name(one, found), one.measurement


def _name(one: EngineResult, found: Sequence[EngineResult]) -> str:
    batches = {other.measurement.batch for other in found if other.measurement}
    return one.backend if len(batches) < 2 or one.measurement is None else f"{one.backend} b{one.measurement.batch}"


def _table(*columns: str, left: int) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="bold")
    for index, name in enumerate(columns):
        table.add_column(name, justify="left" if index < left else "right", overflow="fold", no_wrap=index == 0)
    return table


def _text(value: float | None, digits: int = 3) -> str:
    return _NONE if value is None else f"{value:.{digits}f}"
