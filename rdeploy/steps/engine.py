"""Build, verify and measure engines, each job in a child process."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil

from rdeploy import __version__, backends, environment, serde, worker
from rdeploy.steps import Steps
from rdeploy.steps.made import Built, read_built
from rdeploy.types import Limits, OnnxModel, Target
from rdeploy.worker.jobs import EngineJob, Measured, MeasureJob, VerifyRequest

JOB_TIMEOUT_S = 3600.0


def built(steps: Steps, onnx: OnnxModel, backend: str, verify: VerifyRequest | None) -> Built:
    """Build an engine and verify it, in a child process.

    Raises:
        StageError: the child failed, crashed or hung.
    """
    plugin = backends.find(backend)
    asked = None if verify is None else _placeless(verify, steps.store.root)
    facts = [onnx.sha256, backend, plugin.version(), _deciding(steps.target), asked, environment.fingerprint()]

    def job(folder: Path) -> EngineJob:
        places = {"directory": str(folder / "engine"), "outputs": str(folder / "outputs.npy")}
        return EngineJob(backend=backend, onnx=onnx.path, target=steps.target, verify=verify, **places)

    return read_built(_done(steps, "engine", facts, job, f"{backend} {Path(onnx.path).parent.name[:6]}"))


def measured(steps: Steps, job: MeasureJob, engines: Sequence[str]) -> dict[str, Measured]:
    """Measure engines against each other, interleaved; the same engines on the same machine are measured once."""
    facts = [
        replace(job, entries=()),
        [(one.name, one.batch) for one in job.entries],
        engines,
        environment.fingerprint(),
    ]
    folder = _done(steps, "measure", facts, lambda _: job, f"{len(job.entries)} engines, interleaved")
    answer = json.loads((folder / worker.RESULT_FILE).read_text())["ok"]
    found = [serde.from_json(Measured, entry, where="measure") for entry in answer["entries"]]
    return {entry.name: entry for entry in found}


def _done(steps: Steps, kind: str, facts: Any, job: Callable[[Path], EngineJob | MeasureJob], what: str) -> Path:
    """Return the folder of a job's result, after running it in a child process if there is none.

    A job that fails leaves its folder under `jobs/`, so that it can be run again as it was. The folder is this process's own:
    another one may be at the same job.
    """
    key = serde.digest([facts, __version__])

    def write(folder: Path) -> None:
        with steps.stage("build" if kind == "engine" else kind, what):
            work = _own_folder(steps.store.root / "jobs", key)
            run = steps.run_measuring if kind == "measure" else worker.call
            run(serde.to_json(job(work)), directory=work, timeout_s=JOB_TIMEOUT_S)
            for item in work.iterdir():
                item.rename(folder / item.name)
            work.rmdir()

    return steps.store.make(kind, key, write)


def _own_folder(parent: Path, key: str) -> Path:
    """Return where this process may work on a job; what it or processes that are gone left of it before is removed."""
    for old in parent.glob(f"{key}-*"):
        pid = old.name.rpartition("-")[2]
        if pid == str(os.getpid()) or not (pid.isdigit() and psutil.pid_exists(int(pid))):
            shutil.rmtree(old, ignore_errors=True)
    return parent / f"{key}-{os.getpid()}"


def _placeless(verify: VerifyRequest, root: Path) -> VerifyRequest:
    """Return the request without where its files lie: paths in the store hold hashes, of masks and boxes too."""

    def below(path: str) -> str:
        return os.path.relpath(path, root)

    return replace(
        verify,
        pixels=below(verify.pixels),
        reference=verify.reference and below(verify.reference),
        native=verify.native and below(verify.native),
        masks=verify.masks and (),
        boxes=verify.boxes and (),
    )


def _deciding(target: Target) -> Target:
    """Return the target with only what decides an engine."""
    return replace(
        target, name="", description="", backends=(), sources=(), limits=Limits(), timing=Target(name="").timing
    )
