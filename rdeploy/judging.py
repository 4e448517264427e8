"""What a variant loses, before an engine is built: its FP32 graph runs over some of the judged images.

The answer does not depend on the machine, so that it may be found anywhere and travel.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from rdeploy import backends, serde, spread, usability
from rdeploy.compare import Row
from rdeploy.data.images import ImageSet
from rdeploy.intake import REFERENCE, Build
from rdeploy.pipeline import engines
from rdeploy.results import Cost, Verification
from rdeploy.search import Interval
from rdeploy.steps import export
from rdeploy.types import Variant

FIRST_IMAGES, FIRST_MACS = 128, 100_000_000_000
"""How many images the first round of judging takes at least, and how many multiply-accumulates of the native model: exporting
and starting a process take longer than looking at fewer."""
_MORE = 4
"""How many times as many each further round takes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """What a variant costs and how its decisions compare with the native model's; None for the native model itself."""

    cost: Cost
    verification: Verification | None


def native_row(this: Build) -> Row:
    """Return the native FP32 model as far as judging needs it: its graph."""
    native = Variant(resolution=this.spec.native_resolution)
    return Row(variant=native, graphs={}, exported=export.exported(this.steps, this.model, native, this.judged))


def judge(this: Build, native: Row, variant: Variant, count: int) -> Judged:
    """Run the FP32 graph of a variant over `count` of the judged images, once for all machines.

    Raises:
        RdeployError: the model cannot be reduced so far, or its graph does not run.
    """
    few = subset(this.judged, count)
    exported = export.exported(this.steps, this.model, variant, this.judged)

    def write(folder: Path) -> None:
        outputs = engines.native_outputs(replace(this, judged=few), native)
        cost, found = engines.float_quality(this, variant, outputs, judged=few)
        (folder / "judged.json").write_text(serde.dumps(Judged(cost=cost, verification=found)))

    graphs = [exported.onnx.sha256, native.exported.onnx.sha256]
    images = [few.sha256, few.labels, this.request.void, this.spec_of(variant).preprocessing, this.spec.task]
    key = serde.digest([graphs, images, this.target.limits, backends.find(REFERENCE).version()])
    file = this.steps.store.make("judged", key, write) / "judged.json"
    return serde.from_json(Judged, serde.loads(file.read_text()), where=str(file))


def rounds(images: int, native_macs: int) -> Iterator[int]:
    """Yield how many images each round of judging takes; the last takes all."""
    count = max(FIRST_IMAGES, FIRST_MACS // max(native_macs, 1))
    while count < images:
        yield count
        count *= _MORE
    yield images


def subset(images: ImageSet, count: int) -> ImageSet:
    """Return `count` of the images, evenly spread, so that class folders are all there."""
    if count >= len(images):
        return images
    return images.subset(spread.shares(len(images), count))


def drop_of(verification: Verification) -> Interval:
    """Return how many points a variant loses, with an interval.

    It is `usability.points_lost`; nothing where the native model was compared with nothing.
    """
    lost = usability.points_lost(verification)
    if lost is None:
        return Interval(value=0.0, low=0.0, high=0.0)  # the native model itself
    return Interval(value=lost.drop, low=lost.ci95[0], high=lost.ci95[1])


def changed_of(verification: Verification | None) -> Interval | None:
    """Return how many decisions in a hundred are not the native model's, where labels say what that costs."""
    if verification is None or verification.accuracy is None or verification.agreement is None:
        return None
    agreed = verification.agreement
    return Interval(value=100 * agreed.drop, low=100 * (1 - agreed.ci95[1]), high=100 * (1 - agreed.ci95[0]))


def labels_of(verification: Verification | None) -> int:
    """Return on how many labelled images the loss was found."""
    return verification.accuracy.samples if verification is not None and verification.accuracy is not None else 0
