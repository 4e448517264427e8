"""What to expect before anything is built, and what the baseline says of how the images are prepared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rdeploy import backends, expectations, serde
from rdeploy.compare import Row
from rdeploy.data import advisor, images
from rdeploy.intake import REFERENCE, Build
from rdeploy.pipeline import engines
from rdeploy.steps import export
from rdeploy.types import EXPECTED, Target, Variant

_SMALL_MACS = 1_500_000_000


def expected(this: Build, native: Variant) -> tuple[str, ...]:
    """Say, before engines are built, what can be expected of the precisions that were asked for."""
    if set(this.request.precisions) <= {"fp32"}:
        return ()
    from rdeploy.graph import work

    onnx = export.exported(this.steps, this.model, native, this.judged).onnx
    target = replace(this.target, backends=this.graphs_for)
    found = expectations.expect(work.read(Path(onnx.path)), target, this.request.precisions)
    told = tuple(f"{EXPECTED}{sentence}" for sentence in found)
    for sentence in told:
        this.steps.progress(sentence)
    return told


def batches(target: Target, measured: Sequence[int]) -> tuple[str, ...]:
    """Return a sentence where engines take more than the batch sizes that are measured."""
    sizes = target.batch_sizes
    if set(sizes) <= set(measured):
        return ()
    return (f"engines take batches of {min(sizes)} to {max(sizes)}; measured at {', '.join(map(str, measured))}",)


def preprocessing(this: Build, baseline: Row) -> tuple[str, ...]:
    """Return a sentence when another usual normalisation suits the model clearly better."""
    if this.spec.task != "classification" or this.request.load.random_init or not this.has_real_images:
        return ()
    resolution = this.spec.native_resolution
    count = 32 if baseline.exported.cost.macs < _SMALL_MACS else 12
    pixels = images.load_pixels(this.steps.pixels(this.judged, resolution, this.spec))[:count]

    def write(folder: Path) -> None:
        plugin = backends.find(REFERENCE)
        engine = engines.float_engine(this, baseline)
        with (
            this.steps.stage("verify", "preprocessing"),
            plugin.open_session(engine.folder / engine.engine.path, threads=this.target.threads) as session,
        ):
            name, out = session.inputs[0].name, session.outputs[0].name
            said = advisor.suspect_preprocessing(lambda x: session.run({name: x})[out], pixels, this.spec.preprocessing)
        (folder / "advice.json").write_text(serde.dumps([said] if said else []))

    key = serde.digest([baseline.exported.onnx.sha256, this.judged.sha256, this.spec.preprocessing, count])
    return tuple(serde.loads((this.steps.store.make("advice", key, write) / "advice.json").read_text()))
