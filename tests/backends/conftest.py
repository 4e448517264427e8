import ctypes
import json
import runpy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from rdeploy import hardware
from rdeploy.backends import _trt

TESTS = Path(__file__).parent.parent


@pytest.fixture
def tiny():
    """`tiny["write"](path, ...)` and `tiny["image"]()`."""
    pytest.importorskip("onnx", reason="the tiny networks are written with onnx: pip install 'rdeploy[torch]'")
    return runpy.run_path(str(TESTS / "tiny_onnx.py"))


class Recorder:
    """Remembers the calls made on it; attributes that were not given do not exist, as in a version that lacks them."""

    def __init__(self, calls, name, **known):
        self.__dict__.update(known, _calls=calls, _name=name)

    def __setattr__(self, name, value):
        self._calls.append((f"{self._name}.{name}", value))
        self.__dict__[name] = value

    def method(self, name, result=None):
        def call(*arguments):
            self._calls.append((f"{self._name}.{name}", *arguments))
            return result(*arguments) if callable(result) else result

        self.__dict__[name] = call
        return self


class Context:
    """An execution context whose network doubles its input; batches above 4 are outside its shape range."""

    def __init__(self):
        self.shape, self.addresses = None, {}

    def set_input_shape(self, name, shape):
        self.shape = tuple(shape)
        return shape[0] <= 4

    def get_tensor_shape(self, name):
        return self.shape

    def set_tensor_address(self, name, address):
        self.addresses[name] = address

    def execute_async_v3(self, stream):
        count = int(np.prod(self.shape))
        source, result = ((ctypes.c_float * count).from_address(self.addresses[name]) for name in ("x", "y"))
        for index in range(count):
            result[index] = 2 * source[index]
        return True


def make_engine(inspector_json):
    names, modes = ["x", "y"], {"x": "in", "y": "out"}
    return SimpleNamespace(
        num_io_tensors=2,
        get_tensor_name=lambda index: names[index],
        get_tensor_dtype=lambda name: "FLOAT",
        get_tensor_shape=lambda name: (-1, 3),
        get_tensor_mode=lambda name: modes[name],
        get_tensor_profile_shape=lambda name, index: [(1, 3), (2, 3), (4, 3)],
        create_execution_context=Context,
        create_engine_inspector=lambda: SimpleNamespace(get_engine_information=lambda kind: json.dumps(inspector_json)),
    )


INSPECTOR = {
    10: {
        "Layers": [
            {"LayerType": "CaskConvolution", "Inputs": [{"Format/Datatype": "Row major Int8 format"}]},
            "Reformat",
        ]
    },
    11: {
        "Layers": [
            {"LayerType": "CaskConvolution", "Inputs": [{"Datatype": "Int8", "Format": "Row major"}]},
            {"LayerType": "kgen", "Inputs": [{"Datatype": "Half"}]},
            {"LayerType": "gemm", "Inputs": [{"Datatype": "Half"}]},
        ]
    },
}


def make_trt(major, calls, *, shape=(-1, 3, 8, 8), parses=True, serialized=b"plan"):
    """Return a module shaped like TensorRT 8, 10 or 11, as far as a build and a session go."""
    flags = {8: {"EXPLICIT_BATCH": 0}, 10: {"EXPLICIT_BATCH": 0, "STRONGLY_TYPED": 1}, 11: {"STRONGLY_TYPED": 1}}[major]
    weak = {"FP16": 0, "INT8": 1} if major < 11 else {}
    network = SimpleNamespace(
        num_inputs=1, num_outputs=1, get_input=lambda i: SimpleNamespace(name="x", dtype="FLOAT", shape=shape)
    )
    profile = Recorder(calls, "profile").method("set_shape")
    config = Recorder(calls, "config")
    for name in ("set_flag", "clear_flag", "set_memory_pool_limit", "add_optimization_profile"):
        config.method(name)
    error = SimpleNamespace(
        desc=lambda: "Assertion failed: ok(x): some reason",
        node=lambda: 3,
        node_name=lambda: "n3",
        node_operator=lambda: "Foo",
    )
    parser = SimpleNamespace(parse_from_file=lambda path: parses, num_errors=1, get_error=lambda index: error)

    class ILogger:
        pass

    def build(network, config):
        if serialized is None:
            logger.log(1, "IBuilder::buildSerializedNetwork: Error Code 1: Myelin (no kernel)")
        return serialized

    def make_builder(used):
        nonlocal logger
        logger = used
        builder = Recorder(calls, "builder").method("create_network", network).method("create_builder_config", config)
        return builder.method("create_optimization_profile", profile).method("build_serialized_network", build)

    def deserialize(content):
        if content == b"plan":
            return make_engine(INSPECTOR.get(major, {}))
        logger.log(1, "Serialization assertion failed")
        return None

    def make_runtime(used):
        nonlocal logger
        logger = used
        return SimpleNamespace(deserialize_cuda_engine=deserialize)

    logger = None
    return SimpleNamespace(
        __version__=f"{major}.3.0",
        ILogger=ILogger,
        NetworkDefinitionCreationFlag=SimpleNamespace(**flags),
        BuilderFlag=SimpleNamespace(SPARSE_WEIGHTS="sparse", TF32="tf32", **weak),
        MemoryPoolType=SimpleNamespace(WORKSPACE="workspace"),
        ProfilingVerbosity=SimpleNamespace(DETAILED="detailed"),
        LayerInformationFormat=SimpleNamespace(JSON="json"),
        TensorIOMode=SimpleNamespace(OUTPUT="out"),
        nptype=lambda dtype: np.float32,
        Builder=make_builder,
        OnnxParser=lambda network, logger: parser,
        Runtime=make_runtime,
    )


class HashableNamespace(SimpleNamespace):
    """A module is hashable; a SimpleNamespace is not."""

    __hash__ = object.__hash__


@pytest.fixture
def fake():
    """`fake(major, ...)` gives (flavour, the calls that will be made on its builder)."""

    def make(major, **how):
        calls = []
        trt = HashableNamespace(**vars(make_trt(major, calls, **how)))
        return _trt.Flavour("tensorrt", "TensorRT", trt), calls

    return make


@pytest.fixture
def gpu(monkeypatch):
    """Put an L4 into this machine."""
    device = hardware.Gpu("NVIDIA L4", "sm_89", 24 << 30)
    monkeypatch.setattr(hardware, "gpus", lambda: (device,))
    return device


class Status(int):
    name = "cudaErrorUnknown"


class FakeCuda:
    """The CUDA runtime with host memory for a device; `alive` are the allocations and streams not given back."""

    cudaMemcpyKind = SimpleNamespace(cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2)

    def __init__(self):
        self.alive, self.fails = {}, None

    def _allocate(self, size):
        if self.fails is not None:
            return self.fails, None
        memory = (ctypes.c_ubyte * size)()
        self.alive[ctypes.addressof(memory)] = memory
        return Status(0), ctypes.addressof(memory)

    def cudaHostAlloc(self, size, flags):
        return self._allocate(size)

    def cudaMalloc(self, size):
        return self._allocate(size)

    def cudaStreamCreate(self):
        self.alive["stream"] = True
        return Status(0), 7

    def cudaStreamDestroy(self, stream):
        del self.alive["stream"]
        return (Status(0),)

    def cudaFree(self, address):
        del self.alive[address]
        return (Status(0),)

    cudaFreeHost = cudaFree

    def cudaMemcpyAsync(self, target, source, size, kind, stream):
        ctypes.memmove(target, source, size)
        return (Status(0),)

    def cudaStreamSynchronize(self, stream):
        return (Status(0),)

    def cudaGetErrorString(self, status):
        return Status(0), b"out of memory"


@pytest.fixture
def fake_cuda():
    return FakeCuda()
