"""What each place of the resolution saves: the paper's claims about cost, with measured latency and memory beside them.

    python benchmarks/positions.py [--data photos/] [--analytic] [--network resnet50 ...] [--out benchmarks/results/positions.md]

"Input Resolution Downsizing as a Compression Technique" (arXiv 2504.03749) counts FLOPs and memory: up to 28 % fewer FLOPs for
a ViT, 24 % less memory and FLOPs for segmentation. Here the multiply-accumulates and the peak of live activations come from
the exported graph (`graph/cost.py`), latency and the process's peak memory from `rdeploy build`'s own interleaved runs, each
against the native FP32 network on the same runtime with a 95 % interval. Networks have random weights: this is about cost.
With --data the token schedules are searched on those images and INT8 variants are built as well. What was built is kept in
$RDEPLOY_CACHE: a run that was interrupted goes on where it was. --analytic measures nothing.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import networks

import rdeploy
from rdeploy import export, models, resize
from rdeploy.build_request import LoadOptions
from rdeploy.graph import cost
from rdeploy.results import Cost, Result
from rdeploy.types import Variant, format_size

PLACES = {
    # the paper's: a smaller input, and 88, 80, 64, 56 in place of the stem's 112
    "timm:resnet50": ("input@0.7857", "stem@0.7857", "stem@0.7143", "stem@0.5714", "stem@0.5", "after:layer1@0.7143"),
    "timm:vit_small_patch16_224": (
        "input@0.8571", "input@0.7143", "patch@0.5714", "tokens@0.8571", "tokens@0.7143", "input@0.8571+tokens@0.8571",
    ),
    "torchvision:lraspp_mobilenet_v3_large": ("input@0.8594", "stem@0.8594", "input@0.75", "stem@0.75"),
    "torchvision:fcn_resnet50": ("input@0.8594", "stem@0.8594", "stem@0.75"),
}  # fmt: skip
SIDES = {"torchvision:lraspp_mobilenet_v3_large": 512, "torchvision:fcn_resnet50": 512}
HEAD = (
    "| network | variant | GMACs | against native | weights MB | live activations MB | against native "
    "| ONNX Runtime: p50, speed-up, peak | OpenVINO: p50, speed-up, peak |"
)
CLAIMS = {"vit": ("macs", 0.28), "lraspp": ("both", 0.24), "fcn": ("both", 0.24)}


@dataclass(frozen=True)
class Row:
    """One place of one network: what it costs, and what the runtimes said where anything was measured."""

    name: str
    cost: Cost
    measured: str = ""


def analytic(name: str, ats: tuple[str, ...]) -> Iterator[Row]:
    """Yield the native network and each place, exported and counted."""
    loaded = models.load(name, LoadOptions(random_init=True, native_resolution=native(name), seed=networks.SEED))
    size = loaded.spec.native_resolution
    for at in ("input@1", *ats):
        module, spec, places = loaded.module, loaded.spec, ()
        for place in resize.asked(at, size):
            found = resize.settle(module, spec, place, None)
            module, places = resize.apply(module, spec, (found,)), (*places, found)
            spec = resize.after_place(spec, found)
        variant = resize.variant_of(Variant(resolution=size), places, size)
        with tempfile.TemporaryDirectory(prefix="rdeploy-positions-") as folder:
            graph = export.export(module, spec, variant.resolution, Path(folder) / "model.onnx")
            yield Row("native" if not places else variant.id, cost.summarize(Path(graph.path)))


def built(name: str, ats: tuple[str, ...], data: Path | None) -> Iterator[Row]:
    """Yield the same rows from a build, with what was measured; INT8 ones too where there are images."""
    side = native(name)
    with tempfile.TemporaryDirectory(prefix="rdeploy-positions-") as folder:
        result = rdeploy.build(
            name,
            at=list(ats),
            fp32=True,
            int8=data is not None,
            calib=data,
            calib_samples=networks.CALIBRATION,
            random_init=True,
            native_resolution=side,
            seed=networks.SEED,
            out=folder,
        )
    for one in (result.baseline, *result.variants):
        label = "native" if one is result.baseline else one.variant.id
        if one.cost is None:
            print(f"{name} {label}: {one.failure.message if one.failure else 'nothing was built'}", flush=True)
            continue
        yield Row(label, one.cost, " | ".join(runtime_cells(one)))


def runtime_cells(one: Result) -> Iterator[str]:
    engines = {engine.backend: engine for engine in one.engines}
    for backend in ("onnxruntime", "openvino"):
        engine = engines.get(backend)
        if engine is None or engine.measurement is None:
            yield "–"
            continue
        peak = engine.measurement.memory.process_peak
        text = f"{sorted(engine.measurement.latencies_ms)[len(engine.measurement.latencies_ms) // 2]:.2f} ms"
        if engine.comparison:
            low, high = engine.comparison.speedup_ci95
            text += f", {engine.comparison.speedup:.2f}x [{low:.2f}, {high:.2f}]"
        yield text + (f", {peak / 1e6:.0f} MB" if peak else "")


def native(name: str) -> tuple[int, int]:
    side = SIDES.get(name, 224)
    return side, side


def _change(saved: float) -> str:
    return f"{-100 * saved:+.0f} %" if abs(saved) >= 0.005 else ""


def table(name: str, rows: Iterator[Row]) -> Iterator[str]:
    """Yield the lines of one network's table and what it says about the claim."""
    first: Cost | None = None
    kept: list[tuple[str, float, float]] = []
    for row in rows:
        first = first or row.cost
        fewer, less = 1 - row.cost.macs / first.macs, 1 - row.cost.activation_bytes / first.activation_bytes
        kept.append((row.name, fewer, less))
        weights, live = row.cost.weight_bytes / 1e6, row.cost.activation_bytes / 1e6
        yield (
            f"| {name.partition(':')[2]} {format_size(native(name))} | {row.name} "
            f"| {row.cost.macs / 1e9:.3f} | {_change(fewer)} | {weights:.1f} | {live:.2f} | {_change(less)} "
            f"| {row.measured or '– | –'} |"
        )
    for key, (kind, goal) in CLAIMS.items():
        if key in name:
            reached = [n for n, fewer, less in kept if fewer >= goal and (kind == "macs" or less >= goal)]
            what = "MACs" if kind == "macs" else "MACs and live activations"
            yield f"| | at least {100 * goal:.0f} % fewer {what}: {', '.join(reached) or 'none'} | | | | | | | |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", type=Path, help="photographs for the token schedules and INT8; without them FP32 only"
    )
    parser.add_argument("--network", action="append", help=f"part of a name of {', '.join(PLACES)}; repeatable")
    parser.add_argument("--analytic", action="store_true", help="count only, measure nothing")
    parser.add_argument("--out", type=Path, help="write the table to this file as well")
    arguments = parser.parse_args()
    about = __doc__.split("\n\n")[2].replace("\n", " ")
    lines = [
        "# Places of the resolution: what they save",
        "",
        about,
        "",
        networks.machine(),
        "",
        HEAD,
        "|---" * 9 + "|",
    ]
    print("\n".join(lines), flush=True)
    for name, ats in PLACES.items():
        if arguments.network and not any(part in name for part in arguments.network):
            continue
        rows = analytic(name, ats) if arguments.analytic else built(name, ats, arguments.data)
        for line in table(name, rows):
            print(line, flush=True)
            lines.append(line)
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
