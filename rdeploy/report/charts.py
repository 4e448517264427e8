"""A run's points go in, Vega-Lite specifications come out; the page, the PNG and the SVG are drawn from the same ones.

Colours tell precisions apart and are those of Okabe and Ito, which the colour-blind can tell apart too; shapes tell positions
apart. Nothing is said by colour alone: the tooltip and the table name everything.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rdeploy.report.points import NATIVE, NO_BUNDLE, Bundle, Point, engine_id

Spec = dict[str, Any]

_COLOURS = {"fp32": "#0072B2", "fp16": "#009E73", "bf16": "#009E73", "mixed": "#E69F00", "int8": "#D55E00"}
_MOST_SAMPLES = 400
_SCHEMA = "https://vega.github.io/schema/vega-lite/v6.json"
_TOOLTIP = (
    ("id", "point", None), ("resolution", "input", None), ("p50_ms", "median ms", ".2f"), ("speedup", "speed-up", ".2f"),
    ("accuracy", "accuracy %", ".1f"), ("peak_mb", "peak MB", ".0f"), ("size_mb", "size MB", ".1f"), ("gmacs", "GMACs", ".2f"),
    ("parity_db", "parity dB", ".1f"), ("role", "role", None), ("status", "status", None),
)  # fmt: skip


def charts(
    bundles: Sequence[Bundle], found: Sequence[Point], *, metric: str, judged: Sequence[Point] = ()
) -> dict[str, Spec]:
    """Return the plots that this run has data for, by name, in the order in which they are shown.

    Args:
        judged: what was judged without an engine, for the accuracy at each size.
    """
    made = {
        "pareto": pareto(found, metric=metric),
        "ladder": ladder([*found, *judged], metric=metric),
        "latencies": latencies(bundles),
        "memory": memory(found),
    }
    return {name: spec for name, spec in made.items() if spec is not None}


def pareto(found: Sequence[Point], *, metric: str) -> Spec | None:
    """Latency against accuracy: colour is the precision, shape the position, size the peak memory; the front is a line.

    Where batch sizes differ, latency is that of one image: a run's share.
    """
    drawn = [asdict(one) for one in found if one.p50_ms is not None and one.accuracy is not None]
    if not drawn:
        return None
    sizes = {one["batch"] for one in drawn}
    for one in drawn:
        one["x_ms"] = one["p50_ms"] / (one["batch"] if len(sizes) > 1 else 1)
    colour = _colour(found)
    line = [{"x_ms": one["x_ms"], "accuracy": one["accuracy"]} for one in drawn if one["on_front"]]
    x = {
        "field": "x_ms",
        "type": "quantitative",
        "title": f"median latency{_of_what(sizes)}, ms",
        "scale": {"zero": False, "padding": 20},
    }
    y = {"field": "accuracy", "type": "quantitative", "title": f"{metric}, %", "scale": {"zero": False, "padding": 20}}
    interval = {
        "mark": {"type": "rule", "opacity": 0.35},
        "encoding": {
            "x": x,
            "y": {"field": "accuracy_low", "type": "quantitative"},
            "y2": {"field": "accuracy_high"},
            "color": colour,
        },
    }
    edge = {
        "data": {"values": line},
        "mark": {"type": "line", "interpolate": "step-after", "strokeDash": [4, 3], "color": "#888"},
        "encoding": {"x": x, "y": y},
    }
    return _sized(
        {
            "layer": [edge, interval, _marks(x, y, colour), *_names(drawn, _named(found), x=x, y=y)],
            "data": {"values": drawn},
        },
        height=380,
    )


def _marks(x: Spec, y: Spec, colour: Spec) -> Spec:
    """Return the points themselves: what is chosen by a click or in the legend stays opaque, what has no bundle is pale."""
    grey = {"symbolFillColor": "#888", "symbolStrokeColor": "#888"}
    return {
        # A point of unknown memory is drawn too, small.
        "mark": {
            "type": "point",
            "filled": True,
            "opacity": 0.9,
            "stroke": "#888",
            "strokeWidth": 0.5,
            "invalid": None,
        },
        "params": [
            {"name": "precision_shown", "select": {"type": "point", "fields": ["precision"]}, "bind": "legend"},
            {"name": "picked", "select": {"type": "point", "fields": ["id"]}},
        ],
        "encoding": {
            "x": x,
            "y": y,
            "color": colour,
            "shape": {"field": "position", "type": "nominal", "title": "position", "legend": grey},
            "size": {
                "field": "peak_mb",
                "type": "quantitative",
                "title": "peak MB",
                "scale": {"range": [80, 500]},
                "legend": grey,
            },
            "opacity": {
                "condition": {"test": {"and": [{"param": "precision_shown"}, {"param": "picked"}]}, "value": 0.95},
                "value": 0.15,
            },
            "fillOpacity": {"condition": {"test": {"field": "status", "equal": NO_BUNDLE}, "value": 0.25}, "value": 1},
            "tooltip": _tooltip(),
        },
    }


def _of_what(sizes: Collection[int]) -> str:
    """Say of how many images a latency is."""
    if len(sizes) > 1:
        return " of one image"
    (size,) = sizes
    return "" if size == 1 else f" of a batch of {size}"


def _names(drawn: Sequence[Mapping[str, Any]], named: Collection[str], *, x: Spec, y: Spec) -> list[dict[str, Any]]:
    """Write the names beside their points: away from the nearer edge, the native model's below."""
    middle = (min(one["x_ms"] for one in drawn) + max(one["x_ms"] for one in drawn)) / 2
    return [
        {
            "data": {"values": [one]},
            "mark": {"type": "text", "fontWeight": "bold", "dy": 18 if one["variant"] == NATIVE else -12}
            | ({"align": "left", "dx": 10} if one["x_ms"] <= middle else {"align": "right", "dx": -10}),
            "encoding": {"x": x, "y": y, "text": {"field": "id"}},
        }
        for one in drawn
        if one["id"] in named
    ]


def ladder(found: Sequence[Point], *, metric: str) -> Spec | None:
    """Accuracy against the input's side, a line for each precision: what each step down costs."""
    drawn = [asdict(one) for one in found if one.accuracy is not None and one.variant != NATIVE]
    drawn += [asdict(one) for one in found if one.variant == NATIVE and one.accuracy is not None][:1]
    if len({one["side"] for one in drawn}) < 2:
        return None
    return _sized(
        {
            "data": {"values": drawn},
            "mark": {"type": "line", "point": {"size": 60}},
            "encoding": {
                "x": {
                    "field": "side",
                    "type": "quantitative",
                    "title": "input, pixels of the shorter side",
                    "scale": {"zero": False},
                },
                "y": {
                    "field": "accuracy",
                    "aggregate": "max",
                    "type": "quantitative",
                    "title": f"{metric}, %",
                    "scale": {"zero": False},
                },
                "color": _colour(found),
                "tooltip": [
                    {"field": "side", "title": "side"},
                    {"field": "precision"},
                    {"field": "accuracy", "aggregate": "max", "format": ".1f", "title": f"{metric} %"},
                ],
            },
        },
        height=260,
    )


def latencies(bundles: Sequence[Bundle]) -> Spec | None:
    """The distribution of the raw latencies of every engine: the share of the runs that were at most so slow."""
    rows: list[Mapping[str, Any]] = []
    series: dict[str, Sequence[float]] = {}
    for bundle in bundles:
        for name, engines in ((NATIVE, bundle.baseline_ms), (bundle.name, bundle.latencies_ms)):
            series |= {engine_id(bundle.manifest, name, backend): ms for backend, ms in engines.items()}
    for name, values in series.items():
        ordered = sorted(values)
        stride = max(1, -(-len(ordered) // _MOST_SAMPLES))
        for index in [*range(0, len(ordered) - 1, stride), len(ordered) - 1] if ordered else []:
            rows.append({"engine": name, "ms": round(ordered[index], 4), "share": (index + 1) / len(ordered)})
    if not rows:
        return None
    return _sized(
        {
            "data": {"values": rows},
            "params": [{"name": "engine_shown", "select": {"type": "point", "fields": ["engine"]}, "bind": "legend"}],
            "mark": {"type": "line", "interpolate": "step-after"},
            "encoding": {
                "x": {
                    "field": "ms",
                    "type": "quantitative",
                    "title": "latency of one run, ms (logarithmic)",
                    "scale": {"type": "log"},
                },
                "y": {"field": "share", "type": "quantitative", "title": "share of the runs", "axis": {"format": "%"}},
                "color": {"field": "engine", "type": "nominal", "title": "engine"},
                "strokeDash": {"field": "engine", "type": "nominal"},
                "opacity": {"condition": {"param": "engine_shown", "value": 1}, "value": 0.1},
                "tooltip": [{"field": "engine"}, {"field": "ms", "format": ".3f"}, {"field": "share", "format": ".0%"}],
            },
        },
        height=260,
    )


def memory(found: Sequence[Point]) -> Spec | None:
    """Weights, activations and workspace of every engine, stacked; the mark shows the peak of its process."""
    found = [one for one in found if one.status != NO_BUNDLE]
    parts = ("weights", "activations", "workspace")
    rows = [
        {"id": one.id, "part": part, "mb": getattr(one, f"{part}_mb"), "order": index}
        for one in found
        for index, part in enumerate(parts)
        if getattr(one, f"{part}_mb") is not None
    ]
    peaks = [{"id": one.id, "peak_mb": one.peak_mb} for one in found if one.peak_mb is not None]
    if not rows and not peaks:
        return None
    y = {"field": "id", "type": "nominal", "title": None, "sort": None, "axis": {"labelLimit": 220}}
    bars = {
        "data": {"values": rows},
        "mark": {"type": "bar"},
        "encoding": {
            "y": y,
            "x": {"field": "mb", "type": "quantitative", "title": "MB"},
            "color": {"field": "part", "type": "nominal", "title": "memory", "sort": list(parts)},
            "order": {"field": "order"},
            "tooltip": [{"field": "id"}, {"field": "part"}, {"field": "mb", "format": ".1f", "title": "MB"}],
        },
    }
    ticks = {
        "data": {"values": peaks},
        "mark": {"type": "tick", "thickness": 3, "color": "#888"},
        "encoding": {
            "y": y,
            "x": {"field": "peak_mb", "type": "quantitative"},
            "tooltip": [{"field": "id"}, {"field": "peak_mb", "format": ".1f", "title": "peak of the process, MB"}],
        },
    }
    names = {row["id"] for row in (*rows, *peaks)}
    return _sized({"layer": [bars, ticks]}, height=max(80, 28 * len(names)))


def _colour(found: Sequence[Point]) -> dict[str, Any]:
    shown = [name for name in _COLOURS if name in {one.precision for one in found}]
    scale = {"domain": shown, "range": [_COLOURS[name] for name in shown]}
    legend = {"symbolOpacity": 1}
    return {"field": "precision", "type": "nominal", "title": "precision", "scale": scale, "legend": legend}


def _named(found: Sequence[Point]) -> set[str]:
    """Return the ids that the plot writes beside their points: the pick, and the native model on the same backend."""
    pick = next((one for one in found if one.role == "pick"), None)
    natives = [one for one in found if one.variant == NATIVE and (pick is None or one.backend == pick.backend)]
    return {one.id for one in (pick, *natives[:1]) if one is not None}


def _tooltip() -> list[dict[str, Any]]:
    return [{"field": field, "title": title, **({"format": kind} if kind else {})} for field, title, kind in _TOOLTIP]


def _sized(spec: Spec, *, height: int) -> Spec:
    return {
        "$schema": _SCHEMA,
        "width": "container",
        "height": height,
        "autosize": {"type": "fit", "contains": "padding"},
        **spec,
    }
