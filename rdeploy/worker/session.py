"""The child that holds one engine of a measure job: it opens, warms up and times on request, and otherwise sleeps.

Requests and answers are lines of JSON: {"do": "open" | "warm" | "block" | "usage" | "ask" | "close", ...} -> {...} or an
error.
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

from rdeploy import backends, machine, measure, memory, serde
from rdeploy.errors import ConfigError, RdeployError
from rdeploy.types import TensorInfo
from rdeploy.worker import asked, device
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
    """One engine's life; the `do_` methods are the requests, in the order open, warm, block..., usage, ..., close."""

    def __init__(self, job: SessionJob) -> None:
        self._job = job
        self._backend = backends.find(job.entry.backend)
        self._session: Any = None
        self._inputs: dict[str, NDArray[Any]] = {}
        self._run: Callable[[], object] = lambda: None
        self._device = memory.DeviceMemory(machine.gpu(), free=device.free_bytes())
        self._device_peak = memory.Peak(self._device.read)
        self._usage: dict[str, Any] = {}

    def do_open(self) -> dict[str, Any]:
        entry, usage = self._job.entry, self._usage
        usage["before_open"] = memory.rss_bytes()
        self._backend.load_runtime()
        usage["runtime"], usage["device_context"] = memory.rss_bytes(), self._device.read()
        session = self._backend.open_session(Path(entry.path), threads=self._job.threads)
        memory.reset_peak()
        start = time.perf_counter()
        self._session = session.__enter__()
        open_s = time.perf_counter() - start
        usage["after_open"], usage["peak_open"] = memory.rss_bytes(), memory.peak_bytes()
        device.start_clock(self._session)
        self._inputs = _inputs(self._session.inputs, self._job)
        self._run = lambda: self._session.run(self._inputs)
        usage["peak_was_reset"] = memory.reset_peak()
        return {"open_s": open_s, "device_clock": device.clock_of(self._session)}

    def do_warm(self) -> dict[str, Any]:
        found = asdict(measure.warm_up(self._run, max_s=self._job.timing.max_warmup_s))
        self._device_peak.look()
        return found

    def do_block(self, runs: int, settle: int) -> dict[str, Any]:
        """Time `runs` runs after `settle` untimed ones, which refill the caches that the other engines emptied."""
        for _ in range(settle):
            self._run()
        timed = device.Timed(self._session, self._run)
        return {"latencies_ms": measure.timed_runs(timed, runs), "device_ms": timed.device_ms}

    def do_usage(self) -> dict[str, Any]:
        """Return the memory account of what was done so far."""
        self._device_peak.look()
        facts = {**self._usage, "peak_run": memory.peak_bytes(), "private": memory.private_bytes()}
        facts |= {"device_peak": self._device_peak.bytes, "device_method": self._device.method}
        usage, entry = memory.Usage(**facts), self._job.entry
        account = memory.split(
            usage,
            weights=entry.weights_bytes,
            activations=entry.activation_bytes,
            build_peak=entry.build_peak_bytes,
        )
        return {"memory": serde.to_json(account), "usage": serde.to_json(usage)}

    def do_ask(self, what: str, **options: Any) -> dict[str, Any]:
        """Measure something that was asked for beyond latency (see `asked`)."""
        ready = asked.Ready(
            backend=self._backend, job=self._job, session=self._session, inputs=self._inputs, run=self._run
        )
        return {"found": serde.to_json(asked.MEASURES[what](ready, **options))}

    def do_close(self) -> dict[str, Any]:
        self.release()
        return {}

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
