"""A YAML file of budgets goes in; how much worse each metric may get before a change is a regression comes out.

confidence: 0.99
budgets:
  latency: 5          # percent
  accuracy: 0.5       # points
  throughput: null    # not looked at
backends:
  openvino: {latency: 10}
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rdeploy import plugins, strict_yaml
from rdeploy.errors import ConfigError

_CONFIDENCE = 0.99
_POINTS = ("qdq_coverage", "accuracy", "agreement")


@dataclass(frozen=True, slots=True, kw_only=True)
class Budgets:
    """By how much a metric may get worse: percent of the baseline's value; `qdq_coverage`, `accuracy` and `agreement`
    in points of a hundred. None leaves the metric out."""

    latency: float | None = 5.0
    throughput: float | None = None
    speedup: float | None = 5.0
    memory: float | None = 5.0
    memory_ratio: float | None = 5.0
    build_time: float | None = None
    size: float | None = 1.0
    macs: float | None = 0.0
    params: float | None = 0.0
    weight_bytes: float | None = 0.0
    activation_bytes: float | None = 0.0
    onnx_bytes: float | None = 1.0
    nodes: float | None = 0.0
    qdq_coverage: float | None = 0.0
    accuracy: float | None = 1.0
    agreement: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """The budgets, for all backends and for single ones, and the confidence of every interval."""

    budgets: Budgets = field(default_factory=Budgets)
    backends: tuple[tuple[str, Budgets], ...] = ()
    confidence: float = _CONFIDENCE

    @property
    def alpha(self) -> float:
        """The probability with which an interval may miss the truth."""
        return 1.0 - self.confidence

    def of(self, metric: str, backend: str | None) -> float | None:
        """Return the budget of a metric as a fraction (points as a fraction too), None where it is not looked at."""
        found: float | None = getattr(dict(self.backends).get(backend or "", self.budgets), metric)
        return None if found is None else found / 100.0


def load(path: str | Path | None) -> Rules:
    """Return the rules of a YAML file; the defaults without one.

    Raises:
        ConfigError: the file is not there, says something unknown, or a value that no budget can have.
    """
    if path is None:
        return Rules()
    data = dict(strict_yaml.read(Path(path), what="budgets"))
    for key in data:
        if key not in ("confidence", "budgets", "backends"):
            hint = plugins.did_you_mean(key, ("confidence", "budgets", "backends"))
            raise ConfigError(f"{path}: unknown key {key!r}{hint} (allowed: backends, budgets, confidence)")
    common = _budgets(Budgets(), data.get("budgets", {}), where=f"{path}: budgets")
    special = strict_yaml.mapping(data.get("backends", {}), where=f"{path}: backends")
    known = plugins.names("rdeploy.backends")
    for name in special:
        if name not in known:
            hint = plugins.did_you_mean(name, known)
            raise ConfigError(f"{path}: unknown backend {name!r}{hint}; there are: {', '.join(known)}")
    backends = tuple(
        (name, _budgets(common, values, where=f"{path}: backends.{name}")) for name, values in special.items()
    )
    confidence = data.get("confidence", _CONFIDENCE)
    if not isinstance(confidence, float) or not 0.5 <= confidence < 1.0:
        raise ConfigError(f"{path}: confidence must be a number from 0.5 to below 1, not {confidence!r}")
    return Rules(budgets=common, backends=backends, confidence=confidence)


def _budgets(defaults: Budgets, values: Any, *, where: str) -> Budgets:
    given = dict(strict_yaml.mapping(values, where=where))
    plugins.make_options(Budgets, given, where=where)
    for name, value in given.items():
        if value is not None and not 0.0 <= value < (100.0 if name in _POINTS else float("inf")):
            unit = "points, 0 to below 100" if name in _POINTS else "percent, 0 or more"
            raise ConfigError(f"{where}: {name} must be {unit}, or null, not {value!r}")
    return dataclasses.replace(defaults, **given)
