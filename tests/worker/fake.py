"""A backend for tests: its "ONNX file" is JSON that says how engine and session behave. Copied beside the real ones."""

import ctypes
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rdeploy.errors import StageError, Unsupported
from rdeploy.types import Engine, QuantScheme, TensorInfo

CLASSES = 5


@dataclass(frozen=True)
class Options:
    level: int = 0


def unavailable():
    return None


def version():
    return "1.0"


def scheme(target):
    return QuantScheme(name="fake", activations="int8", ops=())


def build_engine(onnx, directory, *, target, options):
    told = json.loads(Path(onnx).read_text())
    act(told.get("build"), told)
    path = Path(directory) / "engine.fake"
    path.write_text(json.dumps(told))
    return Engine(
        path=path.name,
        sha256="0" * 64,
        size_bytes=path.stat().st_size,
        backend="fake",
        backend_version=version(),
        source_sha256="1" * 64,
        build_s=0.0,
        notes=(f"level {options.level}",),
    )


def cannot_run(engine):
    return "built for the moon" if "moon" in os.environ.get("FAKE_BUILT_FOR", "") else None


def load_runtime():
    pass


def open_session(path, *, threads=None):
    return Session(json.loads(Path(path).read_text()))


class Session:
    """y[n, c] = mean(x[n, c % 3]) * (c + 1), plus whatever was told."""

    def __init__(self, told):
        self.told, self.runs, self.held = told, 0, None
        batch = told.get("batch", -1)
        self.inputs = (
            TensorInfo(name="x", dtype=told.get("dtype", "float32"), shape=(batch, *told.get("sides", (3, 4, 4)))),
        )
        if "device_ms" in told:
            self.time_device = self._time_device
            self.transfers_ms = lambda inputs: {"upload": 0.25, "download": 0.125}
        self.outputs = (TensorInfo(name="y", dtype="float32", shape=(batch, CLASSES)),)

    def _time_device(self):
        self.device_clock, self.device_ms = "the fake's own watch", self.told["device_ms"]

    def __enter__(self):
        act(self.told.get("open"), self.told)
        self.held = np.ones(self.told.get("allocate_bytes", 0), np.uint8)
        return self

    def __exit__(self, *_):
        self.held = None

    def run(self, inputs):
        self.runs += 1
        if self.runs > self.told.get("good_runs", 0):
            act(self.told.get("run"), self.told)
        time.sleep(self.told.get("sleep_s", 0.0))
        x = inputs["x"]
        assert x.dtype == self.inputs[0].dtype
        assert self.inputs[0].shape[0] in (-1, len(x))
        means = x.astype(np.float64).mean(axis=(2, 3))[:, np.arange(CLASSES) % 3]
        y = means * np.arange(1, CLASSES + 1) + self.told.get("shift", 0.0)
        return {"y": y.astype(np.float32) * np.float32(self.told.get("scale", 1.0))}


def act(how, told):
    if "pid_file" in told and how is not None:
        Path(told["pid_file"]).write_text(str(os.getpid()))
    if how == "refuse":
        raise Unsupported("the fake does not know this op; leave it out")
    if how == "stage error":
        raise StageError("run", "the fake gave up")
    if how == "raise":
        raise RuntimeError("vendor trouble\nsecond line")
    if how == "abort":
        sys.stderr.write("vendor: assertion failed\n")
        sys.stderr.flush()
        os.abort()
    if how == "exit":
        os._exit(0)
    if how == "garbage":
        Path(told["result"]).write_text("{not json")
        os._exit(0)
    if how == "abort at exit":
        import atexit

        atexit.register(os.abort)
    if how == "hang":
        child = subprocess.Popen(["sleep", "600"])
        Path(told["pid_file"]).write_text(f"{os.getpid()} {child.pid}")
        time.sleep(600)
    if how == "wait":
        time.sleep(600)
    if how == "chatter":
        print("vendor on stdout", flush=True)
        os.write(1, b"vendor on fd 1\n")
        ctypes.CDLL(None).puts(b"vendor in C")
