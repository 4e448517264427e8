import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest

from rdeploy import hardware
from rdeploy.backends import _trt

TESTS = Path(__file__).parent.parent
FAKES = SimpleNamespace(**runpy.run_path(str(Path(__file__).parent / "fake_trt.py")))


@pytest.fixture
def tiny():
    """`tiny["write"](path, ...)` and `tiny["image"]()`."""
    pytest.importorskip("onnx", reason="the tiny networks are written with onnx: pip install 'rdeploy[torch]'")
    return runpy.run_path(str(TESTS / "tiny_onnx.py"))


@pytest.fixture
def fake():
    """`fake("10.3", ...)` gives (flavour, the calls that will be made on its builder); "rtx" is TensorRT-RTX 1.7."""

    def make(version, **how):
        calls = []
        name, title = ("tensorrt_rtx", "TensorRT-RTX") if version == "rtx" else ("tensorrt", "TensorRT")
        return _trt.Flavour(name, title, FAKES.make_trt(version, calls, **how)), calls

    return make


@pytest.fixture
def flags_set():
    """`flags_set(flavour, calls)` gives the names of the builder's flags that a build set."""

    def names(flavour, calls):
        known = {int(value): name for name, value in flavour.trt.BuilderFlag.__members__.items()}
        return [known[call[1]] for call in calls if call[0] == "config.set_flag" and call[1] != "mine"]

    return names


@pytest.fixture
def gpu(monkeypatch):
    """Put an L4 into this machine."""
    device = hardware.Gpu("NVIDIA L4", "sm_89", 24 << 30)
    monkeypatch.setattr(hardware, "gpus", lambda: (device,))
    return device


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("RDEPLOY_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def fake_cuda():
    return FAKES.FakeCuda()
