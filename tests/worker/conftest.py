"""The fake backend, made known to child processes as a plugin file beside the real ones."""

import json
import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest

from rdeploy import serde
from rdeploy.types import Preprocessing, Target

PREPROCESSING = Preprocessing(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Return `fake(**how) -> path` of a model file for the backend "fake", which child processes find."""
    plugins = tmp_path / "plugins"
    plugins.mkdir()
    shutil.copy(Path(__file__).with_name("fake.py"), plugins / "fake.py")
    start = tmp_path / "start"
    start.mkdir()
    text = f"import rdeploy.backends\nrdeploy.backends.__path__.append({str(plugins)!r})\n"
    (start / "sitecustomize.py").write_text(text)
    existing = os.environ.get("PYTHONPATH")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (str(start), existing))))

    def write(name="model.fake", **how):
        path = tmp_path / name
        path.write_text(json.dumps({key: str(v) if isinstance(v, Path) else v for key, v in how.items()}))
        return path

    return write


@pytest.fixture
def pixels(tmp_path):
    """Return the path of 11 random images (11, 4, 4, 3)."""
    path = tmp_path / "pixels.npy"
    np.save(path, np.random.default_rng(0).integers(0, 256, (11, 4, 4, 3), dtype=np.uint8))
    return path


@pytest.fixture
def engine_job(tmp_path, pixels):
    """Return `engine_job(onnx, verify=..., **fields) -> job`; `verify` None builds only."""

    def make(onnx, *, verify=None, options=(), **fields):
        request = (
            None if verify is None else {"pixels": pixels, "preprocessing": serde.to_json(PREPROCESSING), **verify}
        )
        target = Target(name="bench", backends=("fake",), backend_options=(("fake", options),))
        return {
            "job": "engine",
            "backend": "fake",
            "onnx": onnx,
            "directory": tmp_path / "engines",
            "target": serde.to_json(target),
            "verify": request,
            **fields,
        }

    return make


@pytest.fixture
def gone():
    """Return `gone(pid_file)`: wait until every process named in the file has ended; False after ten seconds."""

    def check(pid_file):
        pids = [int(pid) for pid in _read(pid_file).split()]
        return all(_wait_until_ended(pid) for pid in pids)

    return check


def _read(path, tries=1000):
    for _ in range(tries):
        if path.is_file() and path.read_text():
            return path.read_text()
        time.sleep(0.01)
    raise AssertionError(f"{path} was never written")


def _wait_until_ended(pid, tries=1000):
    for _ in range(tries):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state == "Z":
            return True
        time.sleep(0.01)
    return False
