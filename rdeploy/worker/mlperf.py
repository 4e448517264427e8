"""MLPerf's load generator around an engine: SingleStream and Offline, with its own logs. No official MLPerf result."""

from __future__ import annotations

import importlib
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rdeploy.errors import ConfigError, MissingDependency, StageError
from rdeploy.measured import Scenario

SCENARIOS = ("SingleStream", "Offline")
INSTALL = "pip install 'rdeploy[mlperf]'"
_SAMPLES = 1024
"""How many samples the query sample library says it holds; all of them are the one input that is measured."""
_HEADROOM = 1.25
"""Offline sends all its samples at once, as many as the rate promises for the time: too few would end too early."""
_METRICS = {
    "SingleStream": (r"^90\.0th percentile latency \(ns\)\s*:\s*(\d+)", "90th percentile latency, ms", 1e-6),
    "Offline": (r"^Samples per second\s*:\s*([\d.e+]+)", "samples a second", 1.0),
}
_RESULT = re.compile(r"^Result is\s*:\s*(\w+)", re.MULTILINE)


def run_scenario(
    run: Callable[[], object], name: str, *, folder: Path, seconds: float, rate: float, batch: int
) -> Scenario:
    """Run one scenario for at least `seconds`; `rate` is how many samples a second to expect, `run` does `batch` samples.

    Raises:
        ConfigError: there is no such scenario, or SingleStream is asked of a batch.
        MissingDependency: the load generator is not installed.
        StageError: it wrote no result.
    """
    if name not in SCENARIOS:
        raise ConfigError(f"unknown MLPerf scenario {name!r}; there are: {', '.join(SCENARIOS)}")
    if name == "SingleStream" and batch != 1:
        raise ConfigError(f"SingleStream asks for one sample at a time; measure it at batch 1, not {batch}")
    loadgen = _load()
    folder.mkdir(parents=True, exist_ok=True)
    _start(loadgen, run, _settings(loadgen, name, seconds=seconds, rate=rate), folder=folder, batch=batch)
    return read_summary(folder, name)


def read_summary(folder: Path, name: str) -> Scenario:
    """Return what the load generator wrote into mlperf_log_summary.txt."""
    file = folder / "mlperf_log_summary.txt"
    text = file.read_text() if file.is_file() else ""
    pattern, metric, unit = _METRICS[name]
    value, result = re.search(pattern, text, re.MULTILINE), _RESULT.search(text)
    if value is None or result is None:
        raise StageError("mlperf", f"the load generator wrote no result into {file}")
    pairs = (line.split(":", 1) for line in text.splitlines() if " : " in line)
    summary = tuple((key.strip(), shown.strip()) for key, shown in pairs)
    return Scenario(
        scenario=name,
        valid=result.group(1) == "VALID",
        metric=metric,
        value=float(value.group(1)) * unit,
        summary=summary,
        folder=str(folder),
    )


def _load() -> Any:
    try:
        return importlib.import_module("mlperf_loadgen")
    except ImportError as error:
        raise MissingDependency("MLPerf's load generator is not installed here", install=INSTALL) from error


def _settings(loadgen: Any, name: str, *, seconds: float, rate: float) -> Any:
    settings = loadgen.TestSettings()
    settings.scenario = getattr(loadgen.TestScenario, name)
    settings.mode = loadgen.TestMode.PerformanceOnly
    settings.min_duration_ms = round(seconds * 1000)
    settings.min_query_count = 64
    if name == "Offline":
        settings.offline_expected_qps = rate * _HEADROOM
    else:
        settings.single_stream_expected_latency_ns = round(1e9 / rate)
    return settings


def _start(loadgen: Any, run: Callable[[], object], settings: Any, *, folder: Path, batch: int) -> None:
    output = loadgen.LogOutputSettings()
    output.outdir = str(folder)
    output.copy_summary_to_stdout = False
    log = loadgen.LogSettings()
    log.log_output = output
    log.enable_trace = False
    answering: list[threading.Thread] = []

    def issue(samples: Any) -> None:
        # Offline hands over everything at once and goes on counting while it is worked off.
        thread = threading.Thread(target=_answer, args=(loadgen, run, list(samples), batch))
        answering.append(thread)
        thread.start()

    def issue_here(samples: Any) -> None:
        _answer(loadgen, run, list(samples), batch)

    one_by_one = settings.scenario == loadgen.TestScenario.SingleStream
    sut = loadgen.ConstructSUT(issue_here if one_by_one else issue, lambda: None)
    library = loadgen.ConstructQSL(_SAMPLES, _SAMPLES, lambda samples: None, lambda samples: None)
    try:
        loadgen.StartTestWithLogSettings(sut, library, settings, log)
    finally:
        for thread in answering:
            thread.join()
        loadgen.DestroyQSL(library)
        loadgen.DestroySUT(sut)


def _answer(loadgen: Any, run: Callable[[], object], samples: list[Any], batch: int) -> None:
    for start in range(0, len(samples), batch):
        run()
        responses = [loadgen.QuerySampleResponse(sample.id, 0, 0) for sample in samples[start : start + batch]]
        loadgen.QuerySamplesComplete(responses)
