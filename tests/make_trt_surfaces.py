"""Record the Python API of a real TensorRT: the names of its classes, methods and enumerations, as JSON.

usage: PYTHONPATH=UNPACKED_WHEEL python tests/make_trt_surfaces.py MODULE OUT.json

The bindings wheels on PyPI hold no libraries, and importing them needs no GPU: where a library is missing, a stub with the
functions that the bindings ask for is compiled beside them (a function of it that is called aborts). The fakes of
`tests/backends` have only the names that were recorded here.
"""

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

CLASSES = (
    "Builder", "IBuilderConfig", "ICudaEngine", "IExecutionContext", "INetworkDefinition", "ILayer", "IOptimizationProfile",
    "IRuntimeConfig", "IRuntimeCache", "ITimingCache", "ITensor", "OnnxParser", "OnnxParserRefitter", "ParserError",
    "Refitter", "Runtime", "EngineInspector",
)  # fmt: skip
ENUMS = (
    "BuilderFlag", "CudaGraphStrategy", "DataType", "DeviceType", "EngineCapability", "HardwareCompatibilityLevel",
    "LayerInformationFormat", "MemoryPoolType", "NetworkDefinitionCreationFlag", "OnnxParserFlag", "ProfilingVerbosity",
    "PreviewFeature", "TacticSource", "TensorIOMode", "ComputeCapability", "LayerType",
)  # fmt: skip


def stub_libraries(folder: Path) -> None:
    """Compile a stub for every TensorRT library that the bindings in `folder` need and that is not there."""
    for bindings in folder.glob("*.so"):
        needed = re.findall(r"\[(libnv\S+)\]", run("readelf", "-d", bindings))
        symbols = re.findall(r" U (\w*(?:_INTERNAL|Plugin\w*|ParserVersion))$", run("nm", "-D", bindings), re.MULTILINE)
        source = "#include <stdlib.h>\n" + "".join(f"void* {name}(void) {{ abort(); }}\n" for name in symbols)
        # pybind asks for the plugin registries when it is imported: a null one is never looked into.
        source = re.sub(r"(get\w*PluginRegistry\(void\)) { abort\(\); }", r"\1 { return 0; }", source)
        for name in needed:
            if not (folder / name).exists():
                command = ["gcc", "-shared", "-fPIC", "-x", "c", "-", f"-Wl,-soname,{name}", "-o", str(folder / name)]
                subprocess.run(command, input=source, text=True, check=True)


def run(*command: object) -> str:
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, check=True).stdout


def surface(trt: object) -> dict[str, object]:
    """Return {version, classes: {name: [methods]}, enums: {name: {member: value}}}."""
    classes = {
        name: sorted(m for m in dir(getattr(trt, name)) if not m.startswith("_"))
        for name in CLASSES
        if hasattr(trt, name)
    }
    enums = {
        name: {member: int(value) for member, value in getattr(trt, name).__members__.items()}
        for name in ENUMS
        if hasattr(getattr(trt, name, None), "__members__")
    }
    return {"version": trt.__version__, "classes": classes, "enums": enums}


if __name__ == "__main__":
    module, out = sys.argv[1:]
    if (place := next((p for p in map(Path, sys.path) if (p / module).is_dir()), None)) is not None:
        stub_libraries(place / module)
        import ctypes

        for library in sorted((place / module).glob("libnv*.so*")):
            ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    Path(out).write_text(json.dumps(surface(importlib.import_module(module)), separators=(",", ":")))
