"""A run's bundles go in, one self-contained HTML page comes out: no network, light and dark, printable, usable by keyboard.

The plots are Vega-Lite, drawn by the JavaScript that `vl-convert-python` carries and that is written into the page; a content
security policy in the page keeps it from asking any server for anything.
"""

from __future__ import annotations

import base64
import importlib.util
import json
import urllib.parse
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from rdeploy import __version__, serde
from rdeploy.errors import MissingDependency
from rdeploy.report import charts, ladder, layers, points, searched
from rdeploy.report.points import NATIVE, NO_BUNDLE, Bundle, Point
from rdeploy.report.searched import Outcome
from rdeploy.store import Store, default_root
from rdeploy.types import format_size

INSTALL = "pip install 'rdeploy[report]'"
_NONE = "–"
_MOST_PAIRS = 12
_TITLES = {
    "ladder": (
        "Accuracy against resolution",
        "The best of each precision at each input size; a search judges sizes in FP32 before it builds an engine.",
    ),
    "latencies": (
        "Latency distributions",
        "Every run that was timed; a click on an engine in the legend shows it alone.",
    ),
    "memory": (
        "Memory",
        "Weights, activations and workspace; the grey mark is the peak of a process with this engine alone.",
    ),
}
_COLUMNS = (
    ("engine", "id", None), ("input", "side", ".0f"), ("precision", "precision", None), ("position", "position", None),
    ("p50 ms", "p50_ms", ".2f"), ("speed-up", "speedup", ".2f"), ("accuracy %", "accuracy", ".1f"),
    ("parity dB", "parity_db", ".1f"), ("peak MB", "peak_mb", ".0f"), ("size MB", "size_mb", ".1f"),
    ("GMACs", "gmacs", ".2f"), ("verdict", "usability", None), ("status", "status", None),
)  # fmt: skip


def render(bundles: Sequence[Bundle], outcome: Outcome | None = None) -> str:
    """Return the page.

    Args:
        outcome: what a search chose; the fastest of the front is shown as the pick where there was none.

    Raises:
        MissingDependency: the `report` extra is not installed.
    """
    found = searched.points(bundles, outcome)
    metric = points.metric(bundles)
    specs = charts.charts(bundles, found, judged=searched.judged(bundles, outcome), metric=metric)
    pick = next((one for one in found if one.role == "pick"), None)
    native = _native_of(found, pick)
    manifest = bundles[0].manifest
    page = {
        "version": __version__,
        "title": f"{manifest['model']['name']}: {len(bundles)} variant{'s' * (len(bundles) != 1)} for {manifest['target']}",
        "summary": _summary(pick, native, metric) if outcome is None or outcome.pick else "Nothing was picked.",
        "origin": _origin(manifest),
        "cards": _cards(pick, native, metric) if pick else [],
        "choice": _choice(pick, outcome),
        "reason": outcome.reason if outcome else "The fastest point of the front.",
        "metric": metric,
        "specs": specs,
        "specs_json": _script_json(specs),
        "precisions": sorted({one.precision for one in found}),
        "caption": _caption(found, metric),
        "bare": any(one.status == NO_BUNDLE for one in found),
        "columns": [{"title": title, "text": kind is None} for title, _, kind in _COLUMNS],
        "rows": [_row(one) for one in found],
        "charts": [{"name": n, "title": _TITLES[n][0], "caption": _TITLES[n][1]} for n in specs if n in _TITLES],
        "layers": layers.parts(bundles, found),
        "pairs": list(_pairs(bundles))[:_MOST_PAIRS],
        "task": manifest["model"]["task"],
        "notes": _all_notes(bundles, outcome),
        "machine": [(key, _flat(value)) for key, value in manifest["environment"].items()],
        "commands": list(dict.fromkeys(bundle.manifest["reproduce"] for bundle in bundles)),
        "csv": "data:text/csv;charset=utf-8," + urllib.parse.quote(points.to_csv(found)),
    }
    page["sections"] = _sections(page)
    return _fill(page)


def _all_notes(bundles: Sequence[Bundle], outcome: Outcome | None) -> list[str]:
    others = outcome.others if outcome else ()
    told = [f"{name} lies in the same folder and is not of this search: it is not shown." for name in others]
    return list(dict.fromkeys([*(note for bundle in bundles for note in _notes(bundle.manifest)), *told]))


def _notes(manifest: Mapping[str, Any]) -> list[str]:
    """Return what there is to know about a variant, and why the machine was not fit to measure it on."""
    measured = (engine.get("measurement") or {} for engine in manifest["engines"])
    unfit = [reason for one in measured for reason in one.get("unfit") or ()]
    return [
        *ladder.of_manifest(manifest),
        *(manifest.get("notes") or ()),
        *(f"The machine was not fit to measure on: {reason}" for reason in unfit),
    ]


def image(specs: Mapping[str, Any], name: str, kind: str) -> bytes:
    """Draw one chart as "png" or "svg".

    Raises:
        MissingDependency: the `report` extra is not installed.
    """
    vega = _load("vl_convert")
    spec = {**specs[name], "width": 720, "background": "white"}
    if kind == "svg":
        return str(vega.vegalite_to_svg(spec)).encode()
    return bytes(vega.vegalite_to_png(spec, scale=2.0))


def _fill(page: Mapping[str, Any]) -> str:
    jinja = _load("jinja2")
    folder = resources.files("rdeploy.report")
    environment = jinja.Environment(autoescape=True, undefined=jinja.StrictUndefined, trim_blocks=True)
    template = environment.from_string((folder / "page.html.j2").read_text(encoding="utf-8"))
    raw = {
        "bundle": _inline(_vega()),
        "script": (folder / "page.js").read_text(encoding="utf-8"),
    }
    safe = {name: jinja.filters.Markup(text) for name, text in raw.items()}
    return str(template.render(**{**page, "specs_json": jinja.filters.Markup(page["specs_json"]), **safe}))


def unavailable() -> str | None:
    """Return why no page can be drawn here, or None."""
    missing = [name for name in ("jinja2", "vl_convert") if importlib.util.find_spec(name) is None]
    return f"the HTML report needs {', '.join(missing)}: {INSTALL}" if missing else None


def _load(module: str) -> Any:
    try:
        return __import__(module)
    except ImportError as error:
        raise MissingDependency(f"the HTML report needs {module}", install=INSTALL) from error


def _vega() -> str:
    """Return the JavaScript that draws, 0.9 MB; making it takes seconds, so it is kept."""
    vega = _load("vl_convert")

    def write(folder: Path) -> None:
        (folder / "vega.js").write_text(vega.javascript_bundle(), encoding="utf-8")

    key = serde.digest(["vega", vega.__version__])
    return (Store(default_root()).make("vega", key, write) / "vega.js").read_text(encoding="utf-8")


def _inline(script: str) -> str:
    """Make a script safe inside of a <script> element, and its functions global."""
    return script.replace("</script", "<\\/script")


def _script_json(value: Any) -> str:
    """Return JSON that cannot end the element that it is written into, whatever names a manifest holds."""
    return json.dumps(value).replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _caption(found: Sequence[Point], metric: str) -> str:
    sizes = sorted({one.batch for one in found})
    batch = "" if sizes == [1] else f" A run takes {' or '.join(map(str, sizes))} images."
    against = "Speed-up is against the native FP32 model on the same backend, from interleaved runs."
    return f"Accuracy is {metric}.{batch} {against}"


def _native_of(found: Iterable[Point], pick: Point | None) -> Point | None:
    natives = [one for one in found if one.variant == NATIVE]
    same = [one for one in natives if pick is not None and one.backend == pick.backend]
    return next(iter(same or natives), None)


def _origin(manifest: Mapping[str, Any]) -> str:
    model = manifest["model"]
    return (
        f"{model['source']}, {model['task']}, native {format_size(tuple(model['native_resolution']))}; "
        f"rdeploy {manifest['rdeploy_version']}, {manifest['created']}"
    )


def _choice(pick: Point | None, outcome: Outcome | None) -> str:
    """Return the heading of what was chosen; empty where nothing is and no search says why."""
    if pick is None:
        return "No pick" if outcome else ""
    return "The pick is the native model" if pick.variant == NATIVE else "The pick against the native model"


def _summary(pick: Point | None, native: Point | None, metric: str) -> str:
    if pick is None or native is None:
        return "No variant was measured here."
    parts = [f"{pick.id}"]
    if pick is native:
        parts.append("the native model as it is")
    if pick.speedup is not None:
        parts.append(f"{pick.speedup:.2f} times as fast as the native model ({_range(pick)})")
    if pick.accuracy is not None and native.accuracy is not None and pick is not native:
        parts.append(f"{metric} {pick.accuracy:.1f} % against {native.accuracy:.1f} %")
    if pick.size_mb and native.size_mb and pick is not native:
        parts.append(f"{pick.size_mb / native.size_mb:.2f} of its size")
    return ": ".join([parts[0], ", ".join(parts[1:])]) + "."


def _range(pick: Point) -> str:
    if pick.speedup_low is None or pick.speedup_high is None:
        return "no interval"
    return f"95 % interval {pick.speedup_low:.2f} to {pick.speedup_high:.2f}"


def _cards(pick: Point, native: Point | None, metric: str) -> list[dict[str, str]]:
    rows = (
        ("median latency", "p50_ms", ".2f", "ms"), (metric, "accuracy", ".1f", "%"), ("peak memory", "peak_mb", ".0f", "MB"),
        ("engine size", "size_mb", ".1f", "MB"), ("work", "gmacs", ".2f", "GMACs"),
    )  # fmt: skip
    cards = []
    for name, field, kind, unit in rows:
        mine, theirs = getattr(pick, field), getattr(native, field) if native else None
        if mine is not None:
            against = f"native {theirs:{kind}} {unit}" if theirs is not None else "native not measured"
            against = "" if pick is native else against
            cards.append({"name": name, "value": f"{mine:{kind}} {unit}", "native": against})
    return cards


def _row(one: Point) -> dict[str, Any]:
    cells = []
    for _, field, kind in _COLUMNS:
        value = getattr(one, field)
        if field == "side":
            cells.append({"shown": one.resolution, "sort": value, "text": False})
        elif kind is None:
            cells.append({"shown": value or _NONE, "sort": value, "text": True})
        else:
            cells.append(
                {
                    "shown": _NONE if value is None else f"{value:{kind}}",
                    "sort": "" if value is None else value,
                    "text": False,
                }
            )
    kind = "failed" if one.status == "verification failed" else one.role
    return {"id": one.id, "kind": kind, "precision": one.precision, "cells": cells}


def _pairs(bundles: Iterable[Bundle]) -> Iterable[dict[str, str]]:
    for bundle in bundles:
        for one in bundle.disagreements:
            image_bytes = base64.b64decode(one["jpeg"], validate=True)
            yield {
                "image": "data:image/jpeg;base64," + base64.b64encode(image_bytes).decode(),
                "name": str(one["name"]),
                "variant_id": bundle.name,
                "native": _held(one["native"]),
                "variant": _held(one["variant"]),
                "label": str(one.get("label") or ""),
            }


def _held(text: Any) -> str:
    """Return `tabby 81 %` with its unit held to the number."""
    return str(text).replace(" %", "\u00a0%")


def _sections(page: Mapping[str, Any]) -> list[dict[str, str]]:
    found = [("pick", "Pick")] if page["choice"] else []
    found += [("pareto", "Latency against accuracy")] if "pareto" in page["specs"] else []
    found += [("points", "Every engine"), *((chart["name"], chart["title"]) for chart in page["charts"])]
    found += [("layers", "Layers")] if page["layers"] else []
    found += [("disagreements", "Disagreements")] if page["pairs"] or page["task"] == "embedding" else []
    found += [("machine", "Machine"), ("reproduce", "Reproduce")]
    return [{"id": name, "title": title} for name, title in found]


def _flat(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_flat(item)}" for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(_flat(item) for item in value)
    return _NONE if value is None else str(value)
