"""`build-engine.sh`: the exact `trtexec` call that builds a bundle's TensorRT engine, on a device without our Python.

The script asks trtexec for its version: 8.x needs the precisions as flags and knows no strong typing, 10.x needs
`--stronglyTyped`, 11.x is that by default and has CUDA graphs and spinning on and transfers off when it measures. The script
asks the others for the same, so that what it measures compares between versions.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from rdeploy.types import Target, TensorInfo

SCRIPT = "build-engine.sh"
ENGINE = "engines/tensorrt/tensorrt.engine"
TIMES, PROFILE, LAYERS = "logs/trtexec.times.json", "logs/trtexec.profile.json", "logs/trtexec.layers.json"


def script(onnx: str, sha256: str, inputs: Sequence[TensorInfo], target: Target, *, precision: str) -> str:
    """Return the script of one bundle; `onnx` is the graph's path in it."""
    options = dict(target.options_of("tensorrt"))
    always = [f"--onnx={onnx}", f"--saveEngine={ENGINE}", *_shapes(inputs, target.batch_sizes, options)]
    always += [*_asked(options), "--profilingVerbosity=detailed", "--separateProfileRun", f"--exportTimes={TIMES}"]
    always += [f"--exportProfile={PROFILE}", f"--exportLayerInfo={LAYERS}"]
    versions = {
        "85??": (_weak(precision) + _comparable(), _since_8_6(options)),
        "86??": (_weak(precision) + _comparable() + _since_8_6(options), _since_10(options)),
        "10????": (_ten(options, precision) + _comparable() + _since_8_6(options) + _since_10(options), []),
        "11????": (_since_8_6(options) + _since_10(options), []),
    }
    cases = "\n".join(f"  {pattern}) {_case(*flags)} ;;" for pattern, flags in versions.items())
    return _TEMPLATE.format(
        target=target.name,
        onnx=onnx,
        engine=ENGINE,
        sha256=sha256,
        cases=cases,
        known=", ".join(("8.5", "8.6", "10", "11")),
        always=" \\\n  ".join(_quoted(always)),
    )


_TEMPLATE = """#!/bin/sh
# Builds {engine} from {onnx} with the trtexec of this device, and measures it.
# For the target {target}. Further arguments go to trtexec; TRTEXEC names it where it is not in the PATH.
# Afterwards `rdeploy profile` of this folder, also on another machine, shows what was measured here.
set -eu
cd "$(dirname "$0")"
trtexec=${{TRTEXEC:-trtexec}}
command -v "$trtexec" >/dev/null 2>&1 || trtexec=/usr/src/tensorrt/bin/trtexec
command -v "$trtexec" >/dev/null 2>&1 || {{ echo "no trtexec here: set TRTEXEC to its path" >&2; exit 3; }}
echo "{sha256}  {onnx}" | sha256sum -c --quiet - || {{
  echo "{onnx} was changed after it was made: copy the bundle again" >&2; exit 1;
}}
version=$("$trtexec" --help 2>&1 | sed -n 's/.*\\[TensorRT v\\([0-9]*\\)\\].*/\\1/p' | head -n 1)
missing=
case $version in
{cases}
  *) echo "trtexec reports TensorRT v$version; this script knows {known}" >&2; exit 3 ;;
esac
if [ -n "$missing" ]; then echo "TensorRT v$version has none of:$missing" >&2; fi
mkdir -p {engine_folder} logs
exec "$trtexec" \\
  {always} \\
  --timingCacheFile=logs/trtexec.timing.cache "$@"
""".replace("{engine_folder}", ENGINE.rpartition("/")[0])


def _quoted(words: Sequence[str]) -> list[str]:
    return [shlex.quote(word) for word in words]


def _case(flags: Sequence[str], missing: Sequence[str]) -> str:
    words = " ".join([*_quoted(flags), '"$@"'])
    lacking = f" missing={shlex.quote(' ' + ' '.join(missing))};" if missing else ""
    return f"set -- {words};{lacking}".rstrip(";")


def _shapes(inputs: Sequence[TensorInfo], batch_sizes: Sequence[int], options: Mapping[str, Any]) -> list[str]:
    dynamic = [info for info in inputs if -1 in info.shape]
    if not dynamic:
        return []
    given = options.get("batch_ranges")
    batches = (
        (min(batch_sizes), batch_sizes[0], max(batch_sizes)) if not given else (given[0][0], given[0][1], given[-1][2])
    )
    names = ("--minShapes", "--optShapes", "--maxShapes")
    return [f"{name}={_each(dynamic, batch)}" for name, batch in zip(names, batches)]


def _each(inputs: Sequence[TensorInfo], batch: int) -> str:
    return ",".join(f"{info.name}:{'x'.join(str(batch if n < 0 else n) for n in info.shape)}" for info in inputs)


def _asked(options: Mapping[str, Any]) -> list[str]:
    """Return the flags that every version has."""
    found = []
    if (workspace := options.get("workspace_mb")) is not None:
        found.append(f"--memPoolSize=workspace:{workspace}")
    if options.get("sparse_weights"):
        found.append("--sparsity=enable")
    if options.get("refit"):
        found.append("--refit")
    if not options.get("tf32", True):
        found.append("--noTF32")
    if (core := options.get("dla_core")) is not None:
        found.append(f"--useDLACore={core}")
        found += ["--allowGPUFallback"] if options.get("gpu_fallback", True) else []
    return found


def _since_8_6(options: Mapping[str, Any]) -> list[str]:
    levels = {"ampere_plus": "ampere+", "same_compute_capability": "sameComputeCapability"}
    found = []
    if (level := options.get("optimization_level")) is not None:
        found.append(f"--builderOptimizationLevel={level}")
    if (compatibility := levels.get(options.get("hardware_compatibility", "none"))) is not None:
        found.append(f"--hardwareCompatibilityLevel={compatibility}")
    if options.get("version_compatible"):
        found.append("--versionCompatible")
        found += [] if options.get("lean_runtime") else ["--excludeLeanRuntime"]
    return found


def _since_10(options: Mapping[str, Any]) -> list[str]:
    return ["--stripWeights"] if options.get("strip_weights") else []


def _weak(precision: str) -> list[str]:
    """Return the precisions that a weakly typed version must be allowed to use."""
    found = ["--int8"] if precision in ("int8", "mixed") else []
    return [*found, *(["--fp16"] if precision in ("fp16", "mixed") else [])]


def _ten(options: Mapping[str, Any], precision: str) -> list[str]:
    """Return how 10.x is typed: by the graph, but for DLA by flags."""
    if options.get("dla_core") is None:
        return ["--stronglyTyped"]
    return list(dict.fromkeys([*_weak(precision), "--fp16"]))


def _comparable() -> list[str]:
    """Return what 11.x does by default when it measures."""
    return ["--useCudaGraph", "--useSpinWait", "--noDataTransfers"]
