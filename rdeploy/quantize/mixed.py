"""Mixed precision under accuracy control: an INT8 graph that costs too much goes in, one with a few float layers comes out.

The layers are ranked once (`sensitivity`); then the smallest number of them is found that, left in float, keeps the drop
within the budget. What is judged is the graph that would be deployed, quantized anew with those layers in float. Which number
to try next is predicted: decisions flip in proportion to the amplitude of the error, and the ranking says how much of its
energy is left. How many of a few hundred images flip is luck besides (as Poisson's law has it), and a number that holds may
lie below others that do not: the first numbers tried are those that would hold with some luck, then with less.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from rdeploy.errors import Unsupported
from rdeploy.metrics import segmentation
from rdeploy.quantize.ranges import activations
from rdeploy.quantize.sensitivity import Sensitivity, rank
from rdeploy.quantize.spooled import Spooled
from rdeploy.results import CurvePoint, Fallbacks, Quantization
from rdeploy.types import QuantScheme

log = logging.getLogger(__name__)

MOST_EVALUATIONS, TRUSTED = 12, 3
"""How many graphs are judged at most; and of those that fail, after how many no prediction is believed any more."""
_LUCK = (2.0, 1.5, 1.0, 0.5)
"""By how many standard deviations fewer decisions may flip than are expected, where the first numbers are tried."""
JUDGED = ("classification", "segmentation", "embedding")
Images = Sequence[NDArray[np.float32]]
Counts = Callable[[int, NDArray[Any]], NDArray[np.int64]]
"""Takes the index of an image and its scores (C, h, w), and counts them against its mask (`segmentation.count`)."""


@dataclass(frozen=True, slots=True)
class Judge:
    """Measures how many points a graph loses against its FP32 original, on `samples` images.

    `counted`: by one decision an image, right or wrong.
    """

    drop: Callable[[Path], float]
    samples: int
    labelled: bool
    counted: bool = False


def control(
    fp32: Path,
    out: Path,
    *,
    scheme: QuantScheme,
    images: Images,
    requantize: Callable[[tuple[str, ...]], Quantization],
    judge: Judge,
    max_drop: float,
    first: tuple[tuple[str, float], ...] = (),
) -> Quantization:
    """Write the INT8 graph that keeps the drop within `max_drop` points to `out`; return how it was quantized, with the curve.

    Args:
        requantize: writes the INT8 graph to `out` with the layers named left in float.
        first: layers to try before anything else, with their shares of the error: those of another scheme.

    Raises:
        Unsupported: nothing can stay in INT8, or not in as many evaluations as are allowed.
    """
    names = tuple(name for name, _ in first)
    made = requantize(names)
    drop = judge.drop(out)
    curve: tuple[CurvePoint, ...] = (CurvePoint(layers=len(first), drop=drop, float_macs=_share(fp32, names)),)
    if drop <= max_drop:
        return replace(made, fallbacks=_fallbacks(max_drop, first, 0, curve, judge))
    if first:
        return control(fp32, out, scheme=scheme, images=images, requantize=requantize, judge=judge, max_drop=max_drop)
    ranked = rank(fp32, out, scheme, images)

    def drop_of(count: int) -> float:
        requantize(tuple(one.layer for one in ranked[:count]))
        return judge.drop(out)

    decisions = judge.samples if judge.counted else None
    count, curve, settled = fewest(drop_of, ranked, budget=max_drop, known={0: drop}, decisions=decisions)
    if count == len(ranked):
        raise Unsupported(_nothing_holds(curve, len(ranked), max_drop, judge, settled=settled), stage="quantize")
    made = requantize(tuple(one.layer for one in ranked[:count]))
    if not settled:
        said = f"the search for float layers ended after {len(curve)} evaluations: fewer than {count} may be enough"
        made = replace(made, recipe=(*made.recipe, said))
    kept = tuple((one.layer, one.noise) for one in ranked[:count])
    return replace(made, fallbacks=_fallbacks(max_drop, kept, len(ranked), curve, judge))


def _nothing_holds(
    curve: tuple[CurvePoint, ...], candidates: int, max_drop: float, judge: Judge, *, settled: bool
) -> str:
    first, last = curve[0], curve[-1]
    if settled:
        return f"no layer can stay INT8 within {max_drop:g} points: INT8 alone loses {first.drop:.2f} on {judge.samples} images"
    return (
        f"{len(curve)} evaluations found no number of float layers within {max_drop:g} points: with {last.layers} of "
        f"{candidates} in float {last.drop:.2f} are lost; allow more with --max-drop, or deploy it in float"
    )


def _fallbacks(
    max_drop: float, kept: tuple[tuple[str, float], ...], candidates: int, curve: tuple[CurvePoint, ...], judge: Judge
) -> Fallbacks:
    return Fallbacks(
        max_drop=max_drop,
        layers=kept,
        candidates=candidates,
        evaluations=len(curve),
        curve=curve,
        samples=judge.samples,
        labelled=judge.labelled,
    )


def fewest(
    drop_of: Callable[[int], float],
    ranked: Sequence[Sensitivity],
    *,
    budget: float,
    known: dict[int, float] | None = None,
    decisions: int | None = None,
) -> tuple[int, tuple[CurvePoint, ...], bool]:
    """Return the smallest number of layers, the worst first, whose fallback keeps the drop within `budget`; and the curve.

    And whether it is the smallest: where `MOST_EVALUATIONS` end the search, it is the smallest that was seen to hold.

    Args:
        drop_of: measures the drop, in points, with so many of `ranked` in float.
        known: drops that were measured before.
        decisions: of how many a drop is the share that changed, None where it does not count them.

    With all of them in float nothing is quantized, and nothing drops: that is not measured.
    """
    measured = {len(ranked): 0.0, **(known or {})}
    left = remaining(ranked)

    def holds(count: int) -> bool:
        if count not in measured:
            measured[count] = drop_of(count)
            log.info("%d of %d layers in float: %.2f points lost", count, len(ranked), measured[count])
        return measured[count] <= budget

    low, high = -1, len(ranked)  # `low` fails, `high` holds
    guess, failed, first_hold = 0, 0, True
    hopes = [_hoped(budget, decisions, luck) for luck in _LUCK] if decisions else []
    while high - low > 1 and len(measured) <= MOST_EVALUATIONS:
        guess = min(max(guess, low + 1), high - 1)
        if not holds(guess):
            low, failed = guess, failed + (not hopes)
            believed = high == len(ranked) and failed < TRUSTED
            allowed = hopes.pop(0) if hopes else budget
            guess = _predicted(left, low, measured[low], allowed) if believed else (low + high) // 2
        else:
            # Was the prediction right? Then one layer fewer fails.
            high, guess, first_hold = guess, guess - 1 if first_hold else (low + guess) // 2, False
    curve = tuple(
        CurvePoint(layers=count, drop=drop, float_macs=sum(one.macs for one in ranked[:count]))
        for count, drop in sorted(measured.items())
        if count < len(ranked)
    )
    return high, curve, high - low <= 1


def remaining(ranked: Sequence[Sensitivity]) -> tuple[float, ...]:
    """Return the share of the error's energy that is left when the first 0, 1, 2 … layers are in float."""
    return tuple(max(0.0, 1.0 - sum(one.noise for one in ranked[:count])) for count in range(len(ranked) + 1))


def _predicted(left: Sequence[float], count: int, drop: float, budget: float) -> int:
    """Return how many layers should be enough, when `drop` was measured with `count` of them in float."""
    allowed = left[max(count, 0)] * (budget / drop) ** 2 if drop > 0 else 1.0
    return next((k for k, share in enumerate(left) if share <= allowed), len(left) - 1)


def _hoped(budget: float, decisions: int, luck: float) -> float:
    """Return of how many points the loss comes to `budget` where it is `luck` standard deviations smaller than expected.

    Of n decisions that are expected to flip sqrt(n) is the standard deviation.
    """
    allowed = budget * decisions / 100
    return 100 / decisions * ((luck + math.sqrt(luck**2 + 4 * allowed)) / 2) ** 2


def judge_on(
    reference: Path,
    images: Images,
    *,
    labels: Sequence[int] | None = None,
    counts: Counts | None = None,
    task: str = "classification",
) -> Judge:
    """Return a judge of graphs on `images`, against the outputs of `reference`.

    With `labels` the drop is that of the accuracy, with `counts` of masks that of the mean intersection over union; without,
    the share of images (segmentation: of pixels) that are decided otherwise; for embeddings one minus the mean cosine.

    Raises:
        Unsupported: the task has no decision to count.
    """
    if task not in JUDGED:
        raise Unsupported(f"--max-drop judges {', '.join(JUDGED)}; for {task} build INT8 without it", stage="quantize")
    if counts is not None and task == "segmentation":
        known = _mean_iou(reference, images, counts)
        return Judge(lambda graph: 100 * (known - _mean_iou(graph, images, counts)), len(images), True)
    exact = Spooled([_answer(output, task)] for output in _outputs(reference, images))
    truth = labels if task == "classification" else None

    def drop(graph: Path) -> float:
        pairs = zip((_answer(output, task) for output in _outputs(graph, images)), (row[0] for row in exact))
        if task == "embedding":
            return 100 * (1 - float(np.mean([_cosine(m, e) for m, e in pairs])))
        if truth is not None:
            return 100 * float(np.mean([float(e[0] == t) - float(m[0] == t) for (m, e), t in zip(pairs, truth)]))
        return 100 * (1 - float(np.mean([np.mean(m == e) for m, e in pairs])))

    return Judge(drop, len(exact), truth is not None, counted=task == "classification")


def _mean_iou(path: Path, images: Images, counts: Counts) -> float:
    every = [counts(index, output[0]) for index, output in enumerate(_outputs(path, images))]
    return float(segmentation.mean_iou(np.sum(every, axis=0)[None])[0])


def _outputs(path: Path, images: Images) -> Any:
    name = ir.load(path).graph.outputs[0].name or ""
    return (values[name] for values in activations(path, [name], images))


def _answer(output: NDArray[Any], task: str) -> NDArray[Any]:
    if task == "embedding":
        return output.reshape(-1).astype(np.float64)
    if output.ndim < 2 or output.shape[1] == 1:
        return np.asarray((output > 0).reshape(-1))
    smallest = np.min_scalar_type(output.shape[1] - 1)
    return np.asarray(output.argmax(axis=1).astype(smallest))


def _share(fp32: Path, layers: Sequence[str]) -> float:
    from rdeploy.graph import cost

    macs = {layer.name: layer.macs for layer in cost.layers(fp32)} if layers else {}
    return sum(macs.get(name, 0) for name in layers) / sum(macs.values()) if macs else 0.0


def _cosine(a: NDArray[Any], b: NDArray[Any]) -> float:
    size = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / size if size else 1.0
