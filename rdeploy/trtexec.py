"""`build-engine.sh`: the exact `trtexec` call that builds a bundle's TensorRT engine, on a device without our Python.

The script asks trtexec for its version: 8.x needs the precisions as flags and knows no strong typing, 10.x needs
`--stronglyTyped`, 11.x is that by default and has CUDA graphs and spinning on and transfers off when it measures. The script
asks the others for the same, so that what it measures compares between versions.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from rdeploy import plugins
from rdeploy.backends import _trt_options, tensorrt
from rdeploy.types import Target, TensorInfo

SCRIPT = "build-engine.sh"
ENGINE = "engines/tensorrt/tensorrt.engine"
TIMES, PROFILE, LAYERS = "logs/trtexec.times.json", "logs/trtexec.profile.json", "logs/trtexec.layers.json"
SHAPES = "logs/trtexec.shapes.txt"
"""The shapes that were measured, as trtexec was given them: further arguments of the script may ask for others."""
_TACTIC_SOURCES = ("CUBLAS", "CUBLAS_LT", "CUDNN", "EDGE_MASK_CONVOLUTIONS", "JIT_CONVOLUTIONS")


def script(
    onnx: str, sha256: str, inputs: Sequence[TensorInfo], target: Target, *, precision: str, holds_fp16: bool = False
) -> str:
    """Return the script of one bundle; `onnx` is the graph's path in it, `holds_fp16` whether any of its layers is FP16.

    Raises:
        ConfigError: the profile's options for TensorRT contradict each other.
    """
    given = dict(target.options_of("tensorrt"))
    options = plugins.make_options(tensorrt.Options, given, where=f"{target.name}: tensorrt")
    always = [f"--onnx={onnx}", f"--saveEngine={ENGINE}", *_asked(options), "--profilingVerbosity=detailed"]
    always += ["--separateProfileRun", f"--exportTimes={TIMES}", f"--exportProfile={PROFILE}"]
    always += [f"--exportLayerInfo={LAYERS}"]
    weak = _weak(options, precision, holds_fp16)
    ten = weak if options.dla_core is not None else ["--stronglyTyped"]  # DLA before 11 is typed by flags, as 8.x is
    cublas = _tactic_sources(options)
    versions = {
        "85??": (weak + _comparable() + cublas, _since_8_6(options)),
        "86??": (weak + _comparable() + cublas + _since_8_6(options), _since_10(options)),
        "10????": (ten + _comparable() + cublas + _since_8_6(options) + _since_10(options), []),
        "11????": (_since_8_6(options) + _since_10(options), cublas),
    }
    cases = "\n".join(f"  {pattern}) {_case(*flags)} ;;" for pattern, flags in versions.items())
    return _TEMPLATE.format(
        target=target.name,
        onnx=onnx,
        engine=ENGINE,
        sha256=sha256,
        cases=cases,
        known=", ".join(("8.5", "8.6", "10", "11")),
        shapes=_shapes(inputs, target.batch_sizes, options),
        fixed=shlex.quote(_each(inputs, target.batch_sizes[0])),
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
{shapes}if [ -n "$missing" ]; then echo "TensorRT v$version has none of:$missing" >&2; fi
used=0
for word in "$@"; do case $word in --useProfile=*) used=${{word#*=}} ;; esac; done
profile=0 tuned= shapes=
for word in "$@"; do
  case $word in
    --profile=*) profile=${{word#*=}} ;;
    --optShapes=*) [ "$profile" != "$used" ] || tuned=${{word#*=}} ;;
    --shapes=*) shapes=${{word#*=}} ;;
  esac
done
[ -n "$tuned" ] || tuned={fixed}
mkdir -p {engine_folder} logs
"$trtexec" \\
  {always} \\
  --timingCacheFile=logs/trtexec.timing.cache "$@"
printf '%s\\n' "${{shapes:-$tuned}}" > {measured}
""".replace("{engine_folder}", ENGINE.rpartition("/")[0]).replace("{measured}", SHAPES)


def _quoted(words: Sequence[str]) -> list[str]:
    return [shlex.quote(word) for word in words]


def _case(flags: Sequence[str], missing: Sequence[str]) -> str:
    words = " ".join([*_quoted(flags), '"$@"'])
    lacking = f" missing={shlex.quote(' ' + ' '.join(missing))};" if missing else ""
    return f"set -- {words};{lacking}".rstrip(";")


def _shapes(inputs: Sequence[TensorInfo], batch_sizes: Sequence[int], options: tensorrt.Options) -> str:
    """Return the lines that give a dynamic batch its ranges, and that measure at the target's first batch size.

    trtexec takes several ranges since 10.x, after `--profile=0`, `--profile=1` and so on; its help says of that no more than
    `--useProfile`. One without it gets the one range that holds them all, and the script says so.
    """
    dynamic = [info for info in inputs if -1 in info.shape]
    if not dynamic:
        return ""
    batch, ranges = batch_sizes[0], _trt_options.batch_ranges(options, batch_sizes)
    used = next(index for index, (low, _, high) in enumerate(ranges) if low <= batch <= high)
    joined = (min(low for low, _, _ in ranges), ranges[used][1], max(high for _, _, high in ranges))
    measured = [] if ranges[used][1] == batch else [f"--shapes={_each(dynamic, batch)}"]
    one = f'set -- {" ".join(_quoted([*_range(dynamic, joined), *measured]))} "$@"'
    if len(ranges) == 1:
        return f"{one}\n"
    each = [flag for index, batches in enumerate(ranges) for flag in (f"--profile={index}", *_range(dynamic, batches))]
    several = f'set -- {" ".join(_quoted([*each, f"--useProfile={used}", *measured]))} "$@"'
    told = f" several optimization profiles: batch {joined[0]} to {joined[2]} is one, tuned for {joined[1]}"
    return (
        'if "$trtexec" --help 2>&1 | grep -q -e --useProfile; then\n'
        f'  {several}\nelse\n  {one}; missing="$missing"{shlex.quote(told)}\nfi\n'
    )


def _range(inputs: Sequence[TensorInfo], batches: Sequence[int]) -> list[str]:
    names = ("--minShapes", "--optShapes", "--maxShapes")
    return [f"{name}={_each(inputs, batch)}" for name, batch in zip(names, batches)]


def _each(inputs: Sequence[TensorInfo], batch: int) -> str:
    return ",".join(f"{info.name}:{'x'.join(str(batch if n < 0 else n) for n in info.shape)}" for info in inputs)


def _asked(options: tensorrt.Options) -> list[str]:
    """Return the flags that every version has."""
    found = []
    if options.workspace_mb is not None:
        found.append(f"--memPoolSize=workspace:{options.workspace_mb}")
    if options.sparse_weights:
        found.append("--sparsity=enable")
    if options.refit:
        found.append("--refit")
    if not options.tf32:
        found.append("--noTF32")
    if options.dla_core is not None:
        found.append(f"--useDLACore={options.dla_core}")
        found += ["--allowGPUFallback"] if options.gpu_fallback else []
    return found


def _tactic_sources(options: tensorrt.Options) -> list[str]:
    if options.tactic_sources is None:
        return []
    signs = (f"{'+' if name in options.tactic_sources else '-'}{name}" for name in _TACTIC_SOURCES)
    return [f"--tacticSources={','.join(signs)}"]


def _since_8_6(options: tensorrt.Options) -> list[str]:
    levels = {"ampere_plus": "ampere+", "same_compute_capability": "sameComputeCapability"}
    found = []
    if options.optimization_level is not None:
        found.append(f"--builderOptimizationLevel={options.optimization_level}")
    if (compatibility := levels.get(options.hardware_compatibility)) is not None:
        found.append(f"--hardwareCompatibilityLevel={compatibility}")
    if options.version_compatible:
        found.append("--versionCompatible")
        found += [] if options.lean_runtime else ["--excludeLeanRuntime"]
    return found


def _since_10(options: tensorrt.Options) -> list[str]:
    return ["--stripWeights"] if options.strip_weights else []


def _weak(options: tensorrt.Options, precision: str, holds_fp16: bool) -> list[str]:
    """Return the precisions that a weakly typed build must be allowed to use: those of the graph, and FP16 on DLA.

    DLA computes in FP16 or INT8, never in FP32.
    """
    found = ["--int8"] if precision in ("int8", "mixed") else []
    needs_fp16 = precision == "fp16" or holds_fp16 or options.dla_core is not None
    return [*found, *(["--fp16"] if needs_fp16 else [])]


def _comparable() -> list[str]:
    """Return what 11.x does by default when it measures."""
    return ["--useCudaGraph", "--useSpinWait", "--noDataTransfers"]
