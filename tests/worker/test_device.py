"""On a device, building and measuring a TensorRT engine needs the base install, TensorRT and cuda-python; nothing else."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rdeploy import bundle, serde
from rdeploy.types import OnnxModel, Target, TensorInfo, Timing
from rdeploy.worker.jobs import EngineJob, Entry, MeasureJob

PYTHON = os.environ.get("RDEPLOY_DEVICE_PYTHON") or sys.executable
"""The interpreter of the device; `make device-check` gives a Python 3.10 with as little as a device has."""
FAKES = Path(__file__).parent.parent / "backends" / "fake_trt.py"
BLOCKED = (
    "torch", "torchvision", "timm", "onnx", "onnx_ir", "onnxscript", "onnxruntime", "openvino", "safetensors", "scipy",
    "sympy", "transformers",
)  # fmt: skip
SITE = f"""
import sys
BLOCKED = {BLOCKED!r}

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ModuleNotFoundError("No module named " + repr(name) + " (blocked)", name=name)

sys.meta_path.insert(0, Block())
from rdeploy import hardware
hardware.gpus = lambda: (hardware.Gpu("NVIDIA L4", "sm_89", 24 << 30),)
"""
TENSORRT = f"""
import runpy
fakes = runpy.run_path({str(FAKES)!r})
trt = fakes["make_trt"]("10.3", [])
globals().update(vars(trt))
__version__ = trt.__version__
cuda = fakes["FakeCuda"]()
"""
CUDA = """
import tensorrt
def __getattr__(name):
    return getattr(tensorrt.cuda, name)
"""


@pytest.fixture
def device(tmp_path):
    """Run `python -m MODULE ...` on a machine with a GPU, TensorRT 10.3 and cuda-python, and nothing of the model side."""
    site = tmp_path / "site"
    for name, text in (
        ("sitecustomize.py", SITE), ("tensorrt/__init__.py", TENSORRT), ("cuda/__init__.py", ""),
        ("cuda/bindings/__init__.py", ""), ("cuda/bindings/runtime.py", CUDA),
    ):  # fmt: skip
        (site / name).parent.mkdir(parents=True, exist_ok=True)
        (site / name).write_text(text)
    root = Path(serde.__file__).parent.parent
    environment = os.environ | {"PYTHONPATH": f"{site}{os.pathsep}{root}", "RDEPLOY_CACHE": str(tmp_path / "cache")}

    def run(module, *words):
        return subprocess.run(
            [PYTHON, "-m", module, *map(str, words)],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )

    return run


def job(folder, content):
    folder.mkdir()
    (folder / "job.json").write_text(serde.dumps(content))
    return folder / "job.json"


def answer(path, done):
    assert done.returncode == 0, done.stderr
    return json.loads((path.parent / "result.json").read_text())["ok"]


def test_nothing_of_the_model_side_can_be_imported_there(device, tmp_path):
    done = device("timeit", "-n1", "-r1", "import torch")

    assert "(blocked)" in done.stdout + done.stderr


def test_a_device_builds_verifies_and_measures_an_engine(device, tmp_path):
    onnx = tmp_path / "model.onnx"
    onnx.write_bytes(b"graph")
    engine = EngineJob(
        backend="tensorrt", onnx=str(onnx), directory=str(tmp_path / "engine"), target=Target(name="here", batch_sizes=(1, 4))
    )  # fmt: skip
    build = job(tmp_path / "build", engine)

    built = answer(build, device("rdeploy.worker", build))

    assert built["engine"]["built_for"] == ["sm_89"]
    assert built["not_run"] is None

    timing = Timing(min_samples=16, max_samples=32, min_time_s=0.01, max_time_s=0.2, max_warmup_s=0.2)
    entry = Entry(name="trt", backend="tensorrt", path=str(tmp_path / "engine" / "tensorrt.engine"), batch=2)
    measure = job(tmp_path / "measure", MeasureJob(entries=(entry,), timing=timing))

    (measured,) = answer(measure, device("rdeploy.worker", measure))["entries"]

    assert measured["failure"] is None
    assert measured["measurement"]["batch"] == 2
    assert len(measured["measurement"]["latencies_ms"]) >= 16


def test_profile_builds_and_measures_the_engine_of_a_bundle_there(device, tmp_path, result):
    source = tmp_path / "model.onnx"
    source.write_bytes(b"graph")
    graph = OnnxModel(
        path=str(source), sha256=serde.file_sha256(source), precision="fp32", opset=17, outputs=(),
        inputs=(TensorInfo(name="x", dtype="float32", shape=(-1, 3)),),
    )  # fmt: skip
    row = dataclasses.replace(result.variants[0], engines=())
    folder = bundle.write(tmp_path / "net", result=result, row=row, onnx=source, engines={}, graphs={"tensorrt": graph})
    target = tmp_path / "quick.yaml"
    target.write_text(
        "timing: {min_samples: 16, max_samples: 32, min_time_s: 0.01, max_time_s: 0.2, max_warmup_s: 0.2}"
    )

    done = device("rdeploy", "profile", folder, "--target", target, "--json")

    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    entries = found if isinstance(found, list) else found["engines"]
    assert [one["backend"] for one in entries] == ["tensorrt"]
    assert entries[0]["measurement"]["samples"] >= 16
