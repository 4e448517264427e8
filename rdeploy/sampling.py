"""Multi-objective sampling by Optuna of a space that is too large to enumerate: dimensions go in, choices to try come out.

What was tried is kept in the run's folder, so that a search that was ended goes on where it was; where there is something else
to choose from, it begins anew. The same seed and the same answers give the same choices. Nothing here knows what a choice means;
only what was measured is told.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rdeploy import serde
from rdeploy.errors import MissingDependency

FILE = "samples.journal"
INSTALL = "pip install 'rdeploy[scale]'"
_AT_RANDOM = 8
"""How many samples are drawn before the sampler learns from them."""

Choice = str | int
Choices = Mapping[str, Choice]


@dataclass(frozen=True, slots=True)
class Dimension:
    """One thing to choose."""

    name: str
    choices: tuple[Choice, ...]


class Sampler:
    """Asks for points that may extend the front of two values, both better when lower, and is told what they came to."""

    def __init__(self, folder: Path, dimensions: Sequence[Dimension], *, seed: int) -> None:
        optuna = _optuna()
        storages = optuna.storages  # a journal: one line a step, and several processes may write to it
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", category=optuna.exceptions.ExperimentalWarning)
            self._study = optuna.create_study(
                storage=storages.JournalStorage(storages.journal.JournalFileBackend(str(folder / FILE))),
                study_name=f"samples-{serde.digest(dimensions)[:12]}",
                directions=["minimize", "minimize"],
                load_if_exists=True,
            )
            done = len(self._study.trials)
            self._study.sampler = optuna.samplers.TPESampler(
                seed=seed + done, multivariate=True, n_startup_trials=_AT_RANDOM
            )
        self._failed = optuna.trial.TrialState.FAIL
        self._finished = (optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.FAIL)
        self._distributions = {d.name: optuna.distributions.CategoricalDistribution(d.choices) for d in dimensions}

    @property
    def told(self) -> int:
        """Return how many samples have been answered, also before this process."""
        return sum(trial.state in self._finished for trial in self._study.trials)

    def ask(self, count: int) -> list[tuple[int, Choices]]:
        """Return so many choices to try, each with the number to answer it by."""
        asked = [self._study.ask(self._distributions) for _ in range(count)]
        return [(trial.number, dict(trial.params)) for trial in asked]

    def tell(self, number: int, values: tuple[float, float] | None) -> None:
        """Answer a choice with what was measured of it, None where nothing could be."""
        if values is None:
            self._study.tell(number, state=self._failed, skip_if_finished=True)
        else:
            self._study.tell(number, list(values), skip_if_finished=True)


def require(samples: int) -> None:
    """Find out early whether samples could be drawn.

    Raises:
        MissingDependency: Optuna is not installed.
    """
    if samples:
        _optuna()


def spread(weights: Iterable[Choice], length: int) -> list[float]:
    """Return a few weights stretched over `length` places: (1, 3) over four is 1, 1, 3, 3."""
    few = [float(weight) for weight in weights]
    return [few[index * len(few) // length] for index in range(length)]


def _optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise MissingDependency("--samples needs Optuna, which is not installed", install=INSTALL) from error
    return optuna
