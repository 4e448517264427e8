"""Fakes of TensorRT and CUDA. Their names are those recorded from the vendor's packages (`surfaces/`, `make_trt_surfaces.py`)."""

import ctypes
import enum
import json
import weakref
from pathlib import Path
from types import SimpleNamespace

import numpy as np

SURFACES = Path(__file__).parent / "surfaces"


class Recorder:
    """Remembers the calls made on it; only names that the version's class has can be called or set."""

    def __init__(self, calls, name, names, results):
        self.__dict__.update(_calls=calls, _name=name, _names=names, _results=results)

    def __setattr__(self, name, value):
        if name not in self._names:
            raise AttributeError(f"this version's {self._name} has no {name}")
        self._calls.append((f"{self._name}.{name}", value))
        self.__dict__[name] = value

    def __getattr__(self, name):
        if name.startswith("_") or name not in self._names:
            raise AttributeError(f"this version's {self._name} has no {name}")

        def call(*arguments):
            self._calls.append((f"{self._name}.{name}", *arguments))
            result = self._results.get(name)
            return result(*arguments) if callable(result) else result

        return call


class Limited:
    """Shows of a stand-in only the names that the version's class has."""

    def __init__(self, name, names, stand_in):
        self.__dict__.update(_name=name, _names=names, _stand_in=stand_in)

    def __getattr__(self, name):
        if name not in self._names:
            raise AttributeError(f"this version's {self._name} has no {name}")
        return getattr(self._stand_in, name)

    def __setattr__(self, name, value):
        if name not in self._names:
            raise AttributeError(f"this version's {self._name} has no {name}")
        setattr(self._stand_in, name, value)


class Context:
    """An execution context whose network doubles its input; batches outside every profile are refused.

    Before TensorRT 10 a profile is for one context alone (`holders`), unless the engine was built to share them (None).
    """

    def __init__(self, engine, calls, holders):
        self.engine, self._calls, self._profile, self._holders = engine, calls, 0, holders
        self.shape, self.addresses, self.profiler = None, {}, None

    def set_input_shape(self, name, shape):
        if self._holders is not None and self._holders.setdefault(self._profile, self) is not self:
            return False  # "Profile 0 has been chosen by another IExecutionContext"
        low, _, high = self.engine.get_tensor_profile_shape(name, self._profile)
        self.shape = tuple(shape)
        return low[0] <= shape[0] <= high[0]

    def set_optimization_profile_async(self, index, stream):
        self._calls.append(("context.set_optimization_profile_async", index))
        self._profile = index
        return True

    def is_stream_capturable(self, stream):
        return True

    def get_tensor_shape(self, name):
        return self.shape

    def set_tensor_address(self, name, address):
        self.addresses[name] = address

    def execute_async_v3(self, stream):
        shape, addresses = self.shape, dict(self.addresses)

        def double():
            count = int(np.prod(shape))
            source, result = ((ctypes.c_float * count).from_address(addresses[name]) for name in ("x", "y"))
            for index in range(count):
                result[index] = 2 * source[index]

        FakeCuda.now(stream, double)
        for layer in () if self.profiler is None else LAYERS:
            self.profiler.report_layer_time(layer, 0.25)
        return True


LAYERS = ("Reformatting CopyNode for Input Tensor 0 to conv", "conv + PWN(relu)")


class RuntimeCache:
    def __init__(self):
        self.content = b""

    def deserialize(self, content):
        self.content = bytes(content)

    def serialize(self):
        return self.content + b"+kernels"


def make_engine(trt, limited, inspector_json, calls, ranges):
    names, modes = ["x", "y"], {"x": trt.TensorIOMode.INPUT, "y": trt.TensorIOMode.OUTPUT}
    told = SimpleNamespace(get_engine_information=lambda kind: json.dumps(inspector_json))
    stand_in = SimpleNamespace(
        num_io_tensors=2,
        num_optimization_profiles=len(ranges),
        get_tensor_name=lambda index: names[index],
        get_tensor_dtype=lambda name: trt.DataType.FLOAT,
        get_tensor_shape=lambda name: (-1, 3),
        get_tensor_mode=lambda name: modes[name],
        get_tensor_profile_shape=lambda name, index: [(batch, 3) for batch in ranges[index]],
        create_engine_inspector=lambda: limited("EngineInspector", told),
    )
    engine = limited("ICudaEngine", stand_in)

    def runtime_config():
        config = SimpleNamespace(create_runtime_cache=lambda: limited("IRuntimeCache", RuntimeCache()))
        config.set_runtime_cache = lambda cache: calls.append(("runtime_config.set_runtime_cache", cache.serialize()))
        return limited("IRuntimeConfig", config)

    stand_in.create_runtime_config = runtime_config
    shares = trt.__version__[0] != "8" or any(call[0] == "config.set_preview_feature" for call in calls)
    holders = None if shares else weakref.WeakValueDictionary()
    stand_in.create_execution_context = lambda config=None: limited(
        "IExecutionContext", Context(engine, calls, holders)
    )
    return engine


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


NUMPY = {"FLOAT": np.float32, "HALF": np.float16, "INT8": np.int8, "INT32": np.int32, "BOOL": np.bool_}


def make_parser_error(limited):
    return limited(
        "ParserError",
        SimpleNamespace(
            desc=lambda: "Assertion failed: ok(x): some reason",
            node=lambda: 3,
            node_name=lambda: "n3",
            node_operator=lambda: "Foo",
        ),
    )


class HashableNamespace(SimpleNamespace):
    """A module is hashable; a SimpleNamespace is not."""

    __hash__ = object.__hash__


def make_trt(version, calls, *, shape=(-1, 3, 8, 8), parses=True, serialized=b"plan", layers=(), log=(), errors=1,
             ranges=((1, 2, 4),), timing=True, dtypes=("FLOAT", "FLOAT")):  # fmt: skip
    """Return a module with the names of a recorded version, as far as a build and a session go."""
    file = "tensorrt_rtx-1.7" if version == "rtx" else f"tensorrt-{version}"
    surface = json.loads((SURFACES / f"{file}.json").read_text())
    enums = {name: enum.IntEnum(name, members) for name, members in surface["enums"].items()}
    classes = {name: frozenset(names) for name, names in surface["classes"].items()}
    major = int(surface["version"].split(".")[0])
    trt = HashableNamespace(**enums, __version__=surface["version"])
    for name in classes:
        setattr(trt, name, type(name, (), {}))

    def limited(cls, stand_in):
        return Limited(cls, classes[cls], stand_in)

    def tensor(name, dtype):
        return limited("ITensor", SimpleNamespace(name=name, dtype=trt.DataType[dtype], shape=shape))

    def layer(kind, dtype):
        stand_in = SimpleNamespace(type=trt.LayerType[kind], num_outputs=1, get_output=lambda i: tensor("made", dtype))
        return limited("ILayer", stand_in)

    nodes = [layer(kind, dtype) for kind, dtype in layers]
    network = limited(
        "INetworkDefinition",
        SimpleNamespace(
            num_inputs=1,
            num_outputs=1,
            num_layers=len(nodes),
            get_layer=lambda index: nodes[index],
            get_input=lambda i: tensor("x", dtypes[0]),
            get_output=lambda i: tensor("y", dtypes[1]),
        ),
    )

    def recorder(name, cls, **results):
        return Recorder(calls, name, classes[cls], results)

    cache = recorder("timing", "ITimingCache", serialize=b"times", combine=True) if timing else None
    config = recorder(
        "config", "IBuilderConfig", create_timing_cache=lambda content: None if content == b"bad" else cache,
        set_timing_cache=True, get_timing_cache=cache,
    )  # fmt: skip
    profile = recorder("profile", "IOptimizationProfile")
    parser = limited(
        "OnnxParser",
        SimpleNamespace(
            parse_from_file=lambda path: parses, num_errors=errors, get_error=lambda index: make_parser_error(limited)
        ),
    )
    logger = None

    def build(network, config):
        for line in log:
            logger.log(*line)
        if serialized is None:
            logger.log(1, "IBuilder::buildSerializedNetwork: Error Code 1: Myelin (no kernel)")
        return serialized

    def make_builder(used):
        nonlocal logger
        logger = used
        return recorder(
            "builder", "Builder", create_network=network, create_builder_config=config,
            create_optimization_profile=profile, build_serialized_network=build,
        )  # fmt: skip

    def deserialize(runtime, content):
        """Open a plan; one with host code where that is allowed; an older version's with its lean runtime."""
        allowed = runtime.__dict__.get("engine_host_code_allowed", False)
        if content == b"plan" or (content == b"lean" and allowed) or (content == b"older" and runtime._name == "lean"):
            return make_engine(trt, limited, INSPECTOR.get(major, {}), calls, ranges)
        logger.log(1, "Runtime: engine_host_code_allowed is false" if content == b"lean" else "Serialization failed")
        return None

    def load_lean(path):
        if Path(path).read_bytes() != b"lean runtime":
            logger.log(1, "IRuntime::loadRuntime: Error Code 6: API Usage Error (Unable to load library)")
            return None
        return make_runtime(logger, "lean")

    def make_runtime(used, name="runtime"):
        nonlocal logger
        logger = used
        made = recorder(name, "Runtime", load_runtime=load_lean)
        made._results["deserialize_cuda_engine"] = lambda content: deserialize(made, content)
        return made

    def nptype(dtype):
        if dtype.name not in NUMPY:
            raise TypeError("Could not resolve TensorRT datatype to an equivalent numpy datatype.")
        return NUMPY[dtype.name]

    trt.Builder, trt.Runtime, trt.nptype = make_builder, make_runtime, nptype
    trt.OnnxParser = lambda network, logger: parser
    trt.Refitter = lambda engine, logger: recorder("refitter", "Refitter", refit_cuda_engine=True)
    if "OnnxParserRefitter" in classes:
        trt.OnnxParserRefitter = lambda refitter, logger: recorder(
            "refit_parser", "OnnxParserRefitter", refit_from_file=True
        )
    trt.ILogger = type("ILogger", (), {})
    trt.IProfiler = type("IProfiler", (), {})
    return trt


class Status(int):
    name = "cudaErrorUnknown"


class FakeCuda:
    """The CUDA runtime with host memory for a device; `alive` are the allocations and streams not given back.

    A stream that is captured records what would be done; a launch does it.
    """

    cudaMemcpyKind = SimpleNamespace(cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2)
    cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)
    recording = None

    def __init__(self):
        self.alive, self.fails, self.launches, self.capture_fails = {}, None, 0, False
        self._streams, self.clock_ms, self.times_ms = 0, 0.0, {}
        type(self).recording = None

    @classmethod
    def now(cls, stream, work):
        """Do `work`, or record it when the stream is being captured."""
        if cls.recording is not None:
            cls.recording.append(work)
        else:
            work()

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
        self._streams += 1
        self.alive[f"stream {self._streams}"] = True
        return Status(0), self._streams

    def cudaStreamDestroy(self, stream):
        del self.alive[f"stream {stream}"]
        return (Status(0),)

    def cudaFree(self, address):
        if address:  # freeing nothing is how a program makes CUDA's context
            del self.alive[address]
        return (Status(0),)

    cudaFreeHost = cudaFree

    def cudaMemcpyAsync(self, target, source, size, kind, stream):
        self.now(stream, lambda: (self._pass(0.25), ctypes.memmove(target, source, size)))
        return (Status(0),)

    def _pass(self, milliseconds):
        """Every copy takes a quarter of a millisecond of the device's time, and nothing else takes any."""
        self.clock_ms += milliseconds

    def cudaEventCreate(self):
        event = f"event {len(self.times_ms)}"
        self.times_ms[event] = None
        self.alive[event] = True
        return Status(0), event

    def cudaEventRecord(self, event, stream):
        self.times_ms[event] = self.clock_ms
        return (Status(0),)

    def cudaEventElapsedTime(self, start, end):
        return Status(0), self.times_ms[end] - self.times_ms[start]

    def cudaEventSynchronize(self, event):
        return (Status(0),)

    def cudaEventDestroy(self, event):
        del self.alive[event]
        return (Status(0),)

    def cudaStreamBeginCapture(self, stream, mode):
        type(self).recording = []
        return (Status(0),)

    def cudaStreamEndCapture(self, stream):
        recorded, type(self).recording = self.recording, None
        return (Status(900), None) if self.capture_fails else (Status(0), recorded)

    def cudaGraphInstantiate(self, graph, flags):
        self.alive["graph", id(graph)] = graph
        return Status(0), graph

    def cudaGraphDestroy(self, graph):
        return (Status(0),)

    def cudaGraphLaunch(self, graph, stream):
        self.launches += 1
        for work in graph:
            work()
        return (Status(0),)

    def cudaGraphExecDestroy(self, graph):
        del self.alive["graph", id(graph)]
        return (Status(0),)

    def cudaMemGetInfo(self):
        return Status(0), 1 << 30, 2 << 30

    def cudaStreamSynchronize(self, stream):
        return (Status(0),)

    def cudaGetErrorString(self, status):
        return Status(0), b"out of memory"
