"""What was done to make a lower resolution good, and what came of it: the ladder's steps, the verdict, the options.

Shares are fractions in 0..1; a drop is in points.
"""

from __future__ import annotations

from dataclasses import dataclass

ADAPT = ("auto", "full", "none")
"""What `--adapt` may say: the cheap steps where images and work allow it, however long they take, or not at all."""
LASTING = "fine-tuning "
"""What a message begins with that is told once a round of a training, and stays on the screen."""
OPTIMIZERS = {"adamw": 5e-4, "sgd": 0.05}
"""What trains, with the highest learning rate that suits it; SGD has Nesterov's momentum of 0.9."""
VERDICTS = ("usable", "needs fine-tuning", "dominated")


@dataclass(frozen=True, slots=True, kw_only=True)
class FinetuneOptions:
    """How to fine-tune: the folder of images, and what the user wants otherwise than it is chosen from their number."""

    data: str
    epochs: int | None = None
    batch: int = 64
    optimizer: str = "adamw"
    learning_rate: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Rung:
    """One step of the ladder, judged on images that it did not see.

    `agreement` (with the native model) and `accuracy` (None without labels) are those with this step in place; `gain` is in
    points of whichever of the two decides, against the steps kept before it, with its paired 95 % interval.
    """

    step: str
    kept: bool
    agreement: float
    accuracy: float | None = None
    gain: float = 0.0
    gain_ci95: tuple[float, float] = (0.0, 0.0)
    detail: str = ""
    seconds: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Adaptation:
    """The ladder of one variant: the plain lower resolution first. `images` judged it, `chosen_on` were searched on.

    `native_accuracy` is the native model's on the judging images, None without labels. `reason` says why nothing was tried,
    or why some steps were not.
    """

    metric: str = "agreement"
    images: int = 0
    chosen_on: int = 0
    native_accuracy: float | None = None
    rungs: tuple[Rung, ...] = ()
    reason: str = ""

    @property
    def kept(self) -> tuple[str, ...]:
        """The steps that are part of the variant."""
        return tuple(rung.step for rung in self.rungs[1:] if rung.kept)


@dataclass(frozen=True, slots=True, kw_only=True)
class Usability:
    """Whether a variant is fit for use: one of `VERDICTS`, and the numbers that say so.

    `drop` is what it loses against the native model, in points of accuracy where `labelled`, else of decisions that changed;
    `by` is the variant that dominates it.
    """

    verdict: str
    reason: str
    drop: float
    ci95: tuple[float, float]
    labelled: bool
    by: str | None = None
