"""A run is a folder of bundles: its path goes in, the bundles come out as what a report is made of."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rdeploy import bundle
from rdeploy.errors import ConfigError
from rdeploy.report.points import Bundle
from rdeploy.report.samples import with_samples
from rdeploy.report.searched import Outcome, Seen, seen

MEASUREMENTS, DISAGREEMENTS, OUTCOME = "measurements.json", "disagreements", "outcome.json"
QUANTIZATION = "quantization.json"
_LARGEST_BYTES = 64 << 20
_JPEG = re.compile(r"[A-Za-z0-9+/=]{4,400000}")


def read(path: str | Path) -> tuple[Bundle, ...]:
    """Return the bundles of a run, by name: of a folder that holds them, or the one bundle that `path` is.

    In a folder with a search they are those that the search wrote.

    Raises:
        ConfigError: there is no bundle, one of them is damaged, or they are of several models.
    """
    folder = Path(path)
    if bundle.is_bundle(folder):
        return (_bundle(bundle.folder_of(folder)),)
    found = outcome(folder)
    folders = [one for one in _folders(folder) if found is None or one.name not in found.others]
    if not folders and found is not None:
        raise ConfigError(f"{path}: the search that was here wrote no bundle: {found.reason}")
    if not folders:
        raise ConfigError(f"{path}: no bundle here and none in it; `rdeploy build` and `rdeploy optimize` write them")
    bundles = tuple(map(_bundle, folders))
    _refuse_several_models(path, bundles)
    return bundles


def outcome(path: str | Path) -> Outcome | None:
    """Return what `rdeploy optimize` wrote down in this run; None where there was no search."""
    found = _json(Path(path) / OUTCOME)
    if not isinstance(found, Mapping):
        return None
    written = found.get("bundles")
    return Outcome(
        pick=str(found["pick"]) if found.get("pick") else None,
        reason=str(found.get("reason") or ""),
        front=tuple(map(str, _list(found.get("front")))),
        others=tuple(one.name for one in _folders(Path(path)) if isinstance(written, list) and one.name not in written),
        measured=_seen(found.get("measured")),
        judged=_seen(found.get("judged")),
    )


def _seen(told: Any) -> tuple[Seen, ...]:
    return tuple(one for one in map(seen, _list(told)) if one is not None)


def _list(told: Any) -> list[Any]:
    return told if isinstance(told, list) else []


def _folders(folder: Path) -> list[Path]:
    return sorted(one for one in folder.iterdir() if bundle.is_bundle(one)) if folder.is_dir() else []


def _refuse_several_models(path: str | Path, bundles: Sequence[Bundle]) -> None:
    """Refuse what cannot be compared: each variant is measured beside its own native model.

    Raises:
        ConfigError: the bundles are of several models, or of several versions of one.
    """
    models = [one.manifest["model"] for one in bundles]
    names = dict.fromkeys(f"{model['name']} {str(model.get('sha256') or '')[:8]}".strip() for model in models)
    if len(names) > 1:
        raise ConfigError(
            f"{path}: bundles of {len(names)} models ({', '.join(names)}): a report compares the variants of one model; "
            "move each model's into a folder of its own, or give one bundle"
        )


def _bundle(folder: Path) -> Bundle:
    content = Bundle(folder=folder.name, manifest=bundle.read(folder), latencies_ms={}, baseline_ms={})
    differing = _disagreements(_json(folder.parent / DISAGREEMENTS / f"{folder.name}.json"))
    found = with_samples(content, _json(folder / MEASUREMENTS), _json(folder / "logs" / QUANTIZATION))
    return replace(found, disagreements=differing)


def _disagreements(found: Any) -> tuple[Mapping[str, Any], ...]:
    """Return the entries whose picture is Base64: they end up inside of a page."""
    if not isinstance(found, list):
        return ()
    wanted = {"name", "jpeg", "native", "variant"}
    entries = (one for one in found if isinstance(one, Mapping) and wanted <= set(one))
    return tuple(one for one in entries if isinstance(one["jpeg"], str) and _JPEG.fullmatch(one["jpeg"]))


def _json(file: Path) -> Any:
    """Return what a side file of a bundle holds; None where it is missing. A report does without one that is damaged."""
    try:
        if file.stat().st_size > _LARGEST_BYTES:
            return None
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
