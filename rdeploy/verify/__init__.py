"""Judge an engine by its outputs: against its variant in FP32 (parity), the labels, and the native model's answers.

Outputs are arrays (or memory maps) with one row per image, read in pieces: they need not fit in memory. What the task
is decides what an answer is: a class, the class of each pixel, a vector.
"""

from __future__ import annotations

from collections.abc import Sequence

from rdeploy.metrics.outputs import Outputs
from rdeploy.results import Verification
from rdeploy.types import Limits
from rdeploy.verify import accuracy, agreement, collapse, parity
from rdeploy.verify.accuracy import Truth
from rdeploy.verify.answers import broken_images


def judge(
    outputs: Outputs,
    *,
    task: str = "classification",
    reference: Outputs | None = None,
    native: Outputs | None = None,
    labels: Sequence[int] | None = None,
    truth: Truth | None = None,
    limits: Limits | None = None,
    executed_by: str = "",
) -> Verification:
    """Return the verdict on one engine's outputs; what was not given is not judged.

    Args:
        outputs: of the engine, an array an output, (N, ...) each.
        task: what the outputs mean.
        reference: the same, of the variant in FP32; None when these outputs are that reference.
        native: the outputs of the native model at its own resolution, on the same images.
        labels: N classes; used for (N, C) outputs of a classifier.
        truth: the true boxes of a detector's images.
        limits: when parity counts as a collapse.
        executed_by: the runtime that made `outputs`.
    """
    comparable = reference is not None and not broken_images(outputs)
    found = parity.compare(outputs, reference, task=task) if reference is not None and comparable else None
    reasons = collapse.reasons(outputs, reference, limits or Limits(), task=task, found=found)
    return Verification(
        passed=not reasons,
        reasons=reasons,
        executed_by=executed_by,
        parity=found,
        accuracy=accuracy.score(outputs, task=task, native=native, labels=labels, truth=truth),
        agreement=None if native is None else agreement.agree(outputs, native, task),
    )
