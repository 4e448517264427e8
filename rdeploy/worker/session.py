"""The child that holds one engine of a measure job: it opens, warms up and times on request, and otherwise sleeps.

Requests and answers are lines of JSON: {"do": "open" | "warm" | "block" | "close", ...} -> {...} or an error.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rdeploy import backends, measure, memory, serde
from rdeploy.errors import ConfigError, RdeployError
from rdeploy.types import TensorInfo
from rdeploy.worker.engine import as_input, fill_batch, load_array
from rdeploy.worker.jobs import SessionJob


def serve(job: SessionJob) -> None:
    """Answer requests on stdin until "close" or the end of the pipe."""
    # Vendors print to stdout: the protocol keeps a private copy of it, and theirs goes to the log.
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as channel:
        os.dup2(2, 1)
        served = _Served(job)
        try:
            for line in iter(sys.stdin.buffer.readline, b""):
                request = json.loads(line)
                channel.write(json.dumps(_answer(served, request), allow_nan=False) + "\n")
                channel.flush()
                if request["do"] == "close":
                    return
        finally:
            served.release()


def _answer(served: _Served, request: dict[str, Any]) -> dict[str, Any]:
    fields = {key: value for key, value in request.items() if key != "do"}
    try:
        answer: dict[str, Any] = getattr(served, f"do_{request['do']}")(**fields)
    except RdeployError as error:
        return {"error": type(error).__name__, "message": str(error)}
    except Exception as error:  # noqa: BLE001 - the process boundary: vendors raise anything, and the parent must hear it
        traceback.print_exc()
        text = (str(error).strip() or "no message").splitlines()[0]
        return {"error": type(error).__name__, "message": f"{type(error).__name__}: {text}"}
    return answer


class _Served:
    """One engine's life; the `do_` methods are the requests, in the order open, warm, block..., close."""

    def __init__(self, job: SessionJob) -> None:
        self._job = job
        self._session: Any = None
        self._run: Callable[[], object] = lambda: None
        self._before: int | None = None
        self._after: int | None = None
        self._peak_open: int | None = None
        self._reset = False

    def do_open(self) -> dict[str, Any]:
        entry = self._job.entry
        backend = backends.find(entry.backend)
        session = backend.open_session(Path(entry.path), threads=self._job.threads)
        self._before = memory.rss_bytes()
        memory.reset_peak()
        start = time.perf_counter()
        self._session = session.__enter__()
        open_s = time.perf_counter() - start
        self._after, self._peak_open = memory.rss_bytes(), memory.peak_bytes()
        inputs = _inputs(self._session.inputs, self._job)
        self._run = lambda: self._session.run(inputs)
        self._reset = memory.reset_peak()
        return {"open_s": open_s}

    def do_warm(self) -> dict[str, Any]:
        return asdict(measure.warm_up(self._run, max_s=self._job.timing.max_warmup_s))

    def do_block(self, runs: int, settle: int) -> dict[str, Any]:
        """Time `runs` runs after `settle` untimed ones, which refill the caches that the other engines emptied."""
        for _ in range(settle):
            self._run()
        return {"latencies_ms": measure.timed_runs(self._run, runs)}

    def do_close(self) -> dict[str, Any]:
        usage = memory.Usage(
            before_open=self._before,
            after_open=self._after,
            peak_open=self._peak_open,
            peak_run=memory.peak_bytes(),
            peak_was_reset=self._reset,
        )
        entry = self._job.entry
        account = memory.split(usage, weights=entry.weights_bytes, activations=entry.activation_bytes)
        return {"memory": serde.to_json(account), "usage": serde.to_json(usage)}

    def release(self) -> None:
        if self._session is not None:
            self._session.__exit__(None, None, None)
            self._session = None


def _inputs(infos: tuple[TensorInfo, ...], job: SessionJob) -> dict[str, NDArray[Any]]:
    """Return one batch for every input: images for the first where there are any, seeded random numbers otherwise."""
    entry, rng = job.entry, np.random.default_rng(job.seed)
    made: dict[str, NDArray[Any]] = {}
    for info in infos:
        if info.shape[0] not in (-1, entry.batch):
            raise ConfigError(
                f"{entry.path} takes batches of {info.shape[0]}, not {entry.batch}; measure it at that batch"
            )
        if entry.input is not None and info is infos[0]:
            pixels = fill_batch(load_array(entry.input.pixels, what="images"), entry.batch)
            made[info.name] = as_input(pixels, entry.input.preprocessing, info)
        else:
            made[info.name] = _random(info, entry.batch, rng)
    return made


def _random(info: TensorInfo, batch: int, rng: np.random.Generator) -> NDArray[Any]:
    shape = (batch, *info.shape[1:])
    if min(shape) < 0:
        raise ConfigError(f"input {info.name} has dynamic sizes {info.shape}; give images of the size to measure at")
    dtype = np.dtype(info.dtype)
    if dtype.kind in "iu":
        return rng.integers(0, 128, shape).astype(dtype)
    return rng.standard_normal(shape, dtype=np.float32).astype(dtype)
