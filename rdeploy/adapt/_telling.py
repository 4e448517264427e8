"""What a user is told of a training: one line that changes all the time, one for each round that stays, with the time left."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np

from rdeploy.adapt import Subject
from rdeploy.adapted import LASTING
from rdeploy.metrics.closeness import Closeness

if TYPE_CHECKING:
    from rdeploy.adapt._training import Progress
    from rdeploy.adapt.distill import Plan

_SHOWN_EVERY_S = 0.5


class Teller:
    """Tells of one training; it knows how long the training has run, also before it was killed."""

    def __init__(self, subject: Subject, plan: Plan) -> None:
        self._subject, self._plan = subject, plan
        self._since = self._shown = time.monotonic()
        self.spent_before_s = 0.0

    @property
    def spent_s(self) -> float:
        return self.spent_before_s + time.monotonic() - self._since

    def say(self, text: str) -> None:
        """Tell something that stays."""
        self._subject.tell(f"{LASTING}{self._subject.name}: {text}")

    def show(self, state: Progress) -> None:
        """Tell where the training is, at most twice a second."""
        now = time.monotonic()
        if now - self._shown < _SHOWN_EVERY_S:
            return
        self._shown = now
        total = self._plan.steps
        bar = "#" * (20 * state.step // total)
        self._subject.tell(
            f"training {self._subject.name} [{bar:<20}] {state.step}/{total}, best {percent(state.best[0])}, {self._pace(state)}"
        )

    def round(self, state: Progress, score: Closeness) -> None:
        """Tell how an examination went."""
        self.say(
            f"epoch {state.step / self._plan.epoch_steps:.3g} of {self._plan.epochs}: {percent(score.share)} alike (best "
            f"{percent(state.best[0])}, at first {percent(state.first[0])}), {self._pace(state)}"
        )

    def _pace(self, state: Progress) -> str:
        recent = state.losses[-100:]
        loss = float(np.mean(recent)) if recent else float("nan")
        rate = state.step * self._plan.batch / max(1e-9, self.spent_s)
        left = (self._plan.steps - state.step) * self.spent_s / max(1, state.step)
        return f"loss {loss:.4f}, {rate:.0f} images/s, {duration(left)} left"


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def duration(seconds: float) -> str:
    """Return `42 s`, `12 min` or `3.4 h`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
