"""The engine job: build an engine, run it over the images, and judge its outputs, all in this process."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rdeploy import backends, machine, memory, plugins, serde, verify
from rdeploy.errors import ConfigError, InvariantError
from rdeploy.metrics.outputs import Outputs, load
from rdeploy.results import Verification
from rdeploy.types import Engine, Preprocessing, TensorInfo
from rdeploy.verify.accuracy import Truth
from rdeploy.worker import device
from rdeploy.worker.jobs import EngineJob, VerifyJob, VerifyRequest
from rdeploy.worker.process import mark_stage
from rdeploy.worker.recorder import Recorder

Array = NDArray[Any]


def build_and_verify(job: EngineJob) -> dict[str, Any]:
    """Return {engine, verification, not_run}; `not_run` says why an engine built for other hardware was not run."""
    backend = backends.find(job.backend)
    where = f"target {job.target.name}, backend {job.backend}"
    options = plugins.make_options(backend.Options, dict(job.target.options_of(job.backend)), where=where)
    directory = Path(job.directory)
    directory.mkdir(parents=True, exist_ok=True)
    mark_stage("build")
    engine = _build(backend, job, directory, options)
    not_run = backend.cannot_run(engine)
    verification = None
    if job.verify is not None and not_run is None:
        with backend.open_session(directory / engine.path, threads=job.target.threads) as session:
            name = f"{job.backend} {engine.backend_version}"
            verification = _verify(session, job.verify, outputs=job.outputs, executed_by=name)
    return {"engine": serde.to_json(engine), "verification": serde.to_json(verification), "not_run": not_run}


def _build(backend: Any, job: EngineJob, directory: Path, options: Any) -> Engine:
    """Build, and on a GPU watch how much of its memory the build takes."""
    gpu = memory.DeviceMemory(machine.gpu(), free=device.free_bytes())
    watched = memory.Peak(gpu.read) if gpu.read() is not None else None
    with watched or contextlib.nullcontext():
        engine: Engine = backend.build_engine(Path(job.onnx), directory, target=job.target, options=options)
    return engine if watched is None else dataclasses.replace(engine, build_device_peak_bytes=watched.bytes)


def verify_engine(job: VerifyJob) -> dict[str, Any]:
    """Return {verification} of an engine that was built before."""
    backend = backends.find(job.backend)
    with backend.open_session(Path(job.path), threads=job.threads) as session:
        name = f"{job.backend} {backend.version()}"
        verification = _verify(session, job.verify, outputs=job.outputs, executed_by=name)
    return {"verification": serde.to_json(verification)}


def load_array(path: str, *, what: str) -> Array:
    """Memory-map a .npy file; pickled objects are never loaded.

    Raises:
        ConfigError: it is missing or not a plain array.
    """
    try:
        array: Array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ConfigError(f"cannot read the {what} from {path}: {error}") from error
    if not isinstance(array, np.ndarray):
        raise ConfigError(f"cannot read the {what} from {path}: give a .npy file with one array")
    return array


def as_input(pixels: Array, preprocessing: Preprocessing, info: TensorInfo) -> Array:
    """Turn uint8 (N, H, W, C) into what an engine's input wants: itself, or normalised (N, C, H, W) of its dtype."""
    if info.takes_pixels:
        return np.ascontiguousarray(pixels)
    from rdeploy.data.preprocess import normalise

    return np.ascontiguousarray(normalise(np.asarray(pixels), preprocessing).astype(info.dtype, copy=False))


def fill_batch(pixels: Array, batch: int) -> Array:
    """Return exactly `batch` images, repeating from the first where there are fewer."""
    return pixels[np.arange(batch) % len(pixels)]


def _verify(session: Any, request: VerifyRequest, *, outputs: str | None, executed_by: str) -> Verification:
    mark_stage("verify")
    pixels = load_array(request.pixels, what="images")
    if pixels.ndim != 4 or not len(pixels):
        raise ConfigError(f"the images in {request.pixels} must be (N, H, W, C) with N at least 1, not {pixels.shape}")
    made = run_over(session, pixels, request, outputs=None if outputs is None else Path(outputs))
    return verify.judge(
        made,
        task=request.task,
        reference=None if request.reference is None else load(request.reference),
        native=None if request.native is None else load(request.native),
        labels=request.labels,
        truth=_truth(request),
        limits=request.limits,
        executed_by=executed_by,
    )


def _truth(request: VerifyRequest) -> Truth | None:
    if request.boxes is None or request.frame is None:
        return None
    from rdeploy.data.boxes import read_boxes

    return Truth(boxes=tuple(read_boxes(path) for path in request.boxes), frame=request.frame)


def run_over(session: Any, pixels: Array, request: VerifyRequest, *, outputs: Path | None) -> Outputs:
    """Run an entered session over all images and return its outputs, float32 (N, ...) each.

    With `outputs` the rows go to files beside that .npy file as they come. A static batch is filled up by repeating
    images, whose rows are cut off again.
    """
    info = session.inputs[0]
    batch = info.shape[0] if info.shape[0] > 0 else min(request.batch, len(pixels))
    recorder = Recorder(len(pixels), (pixels.shape[1], pixels.shape[2]), request, outputs)
    recorder.names = tuple(output.name for output in session.outputs)
    for start in range(0, len(pixels), batch):
        piece = pixels[start : start + batch]
        rows = _outputs(session, as_input(fill_batch(piece, batch), request.preprocessing, info), batch)
        recorder.add(start, [values[: len(piece)] for values in rows])
    return recorder.finish()


def _outputs(session: Any, images: Array, batch: int) -> list[Array]:
    found = session.run({session.inputs[0].name: images})
    for info in session.outputs:
        rows = found[info.name]
        if rows.ndim < 2 or len(rows) != batch:
            raise InvariantError(f"output {info.name} has shape {rows.shape} for a batch of {batch} images")
    return [found[info.name] for info in session.outputs]
