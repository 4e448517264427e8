"""Fakes of TensorRT, with the names recorded from the vendor's packages (`surfaces/`, `make_trt_surfaces.py`)."""

import ctypes
import dataclasses
import enum
import json
import runpy
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

SURFACES = Path(__file__).parent / "surfaces"
CUDA = runpy.run_path(str(Path(__file__).with_name("fake_cuda.py")))
FakeCuda, Status = CUDA["FakeCuda"], CUDA["Status"]


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


@dataclasses.dataclass
class Made:
    """A fake module that is being put together: the recorded names of its classes, its calls, and the logger of today."""

    trt: Any
    classes: dict
    calls: list
    logger: Any = None

    def limited(self, cls, stand_in):
        return Limited(cls, self.classes[cls], stand_in)

    def recorder(self, name, cls, **results):
        return Recorder(self.calls, name, self.classes[cls], results)


def make_trt(version, calls, *, shape=(-1, 3, 8, 8), parses=True, serialized=b"plan", layers=(), log=(), errors=1,
             ranges=((1, 2, 4),), timing=True, dtypes=("FLOAT", "FLOAT")):  # fmt: skip
    """Return a module with the names of a recorded version, as far as a build and a session go."""
    file = "tensorrt_rtx-1.7" if version == "rtx" else f"tensorrt-{version}"
    surface = json.loads((SURFACES / f"{file}.json").read_text())
    enums = {name: enum.IntEnum(name, members) for name, members in surface["enums"].items()}
    classes = {name: frozenset(names) for name, names in surface["classes"].items()}
    made = Made(HashableNamespace(**enums, __version__=surface["version"]), classes, calls)
    for name in classes:
        setattr(made.trt, name, type(name, (), {}))
    add_parser(made, parses=parses, errors=errors)
    add_builder(made, make_network(made, shape, dtypes, layers), serialized=serialized, log=log, timing=timing)
    add_runtime(made, INSPECTOR.get(int(surface["version"].split(".")[0]), {}), ranges)
    made.trt.nptype = nptype
    made.trt.ILogger = type("ILogger", (), {})
    made.trt.IProfiler = type("IProfiler", (), {})
    return made.trt


def make_network(made, shape, dtypes, layers):
    """Return a network with an input, an output and some layers of a kind and a type."""

    def tensor(name, dtype):
        return made.limited("ITensor", SimpleNamespace(name=name, dtype=made.trt.DataType[dtype], shape=shape))

    def layer(kind, dtype):
        output = tensor("made", dtype)
        stand_in = SimpleNamespace(type=made.trt.LayerType[kind], num_outputs=1, get_output=lambda i: output)
        return made.limited("ILayer", stand_in)

    nodes = [layer(kind, dtype) for kind, dtype in layers]
    stand_in = SimpleNamespace(
        num_inputs=1, num_outputs=1, num_layers=len(nodes), get_layer=lambda index: nodes[index],
        get_input=lambda i: tensor("x", dtypes[0]), get_output=lambda i: tensor("y", dtypes[1]),
    )  # fmt: skip
    return made.limited("INetworkDefinition", stand_in)


def add_parser(made, *, parses, errors):
    stand_in = SimpleNamespace(
        parse_from_file=lambda path: parses, num_errors=errors, get_error=lambda index: make_parser_error(made.limited)
    )
    parser = made.limited("OnnxParser", stand_in)
    made.trt.OnnxParser = lambda network, logger: parser


def add_builder(made, network, *, serialized, log, timing):
    cache = made.recorder("timing", "ITimingCache", serialize=b"times", combine=True) if timing else None
    config = made.recorder(
        "config", "IBuilderConfig", create_timing_cache=lambda content: None if content == b"bad" else cache,
        set_timing_cache=True, get_timing_cache=cache,
    )  # fmt: skip
    profile = made.recorder("profile", "IOptimizationProfile")

    def build(network, config):
        for line in log:
            made.logger.log(*line)
        if serialized is None:
            made.logger.log(1, "IBuilder::buildSerializedNetwork: Error Code 1: Myelin (no kernel)")
        return serialized

    def make_builder(used):
        made.logger = used
        return made.recorder(
            "builder", "Builder", create_network=network, create_builder_config=config,
            create_optimization_profile=profile, build_serialized_network=build,
        )  # fmt: skip

    made.trt.Builder = make_builder


def add_runtime(made, inspected, ranges):
    def deserialize(runtime, content):
        """Open a plan; one with host code where that is allowed; an older version's with its lean runtime."""
        allowed = runtime.__dict__.get("engine_host_code_allowed", False)
        if content == b"plan" or (content == b"lean" and allowed) or (content == b"older" and runtime._name == "lean"):
            return make_engine(made.trt, made.limited, inspected, made.calls, ranges)
        told = "Runtime: engine_host_code_allowed is false" if content == b"lean" else "Serialization failed"
        made.logger.log(1, told)
        return None

    def load_lean(path):
        if Path(path).read_bytes() != b"lean runtime":
            made.logger.log(1, "IRuntime::loadRuntime: Error Code 6: API Usage Error (Unable to load library)")
            return None
        return make_runtime(made.logger, "lean")

    def make_runtime(used, name="runtime"):
        made.logger = used
        runtime = made.recorder(name, "Runtime", load_runtime=load_lean)
        runtime._results["deserialize_cuda_engine"] = lambda content: deserialize(runtime, content)
        return runtime

    made.trt.Runtime = make_runtime
    made.trt.Refitter = lambda engine, logger: made.recorder("refitter", "Refitter", refit_cuda_engine=True)
    if "OnnxParserRefitter" in made.classes:
        made.trt.OnnxParserRefitter = lambda refitter, logger: made.recorder(
            "refit_parser", "OnnxParserRefitter", refit_from_file=True
        )


def nptype(dtype):
    if dtype.name not in NUMPY:
        raise TypeError("Could not resolve TensorRT datatype to an equivalent numpy datatype.")
    return NUMPY[dtype.name]
