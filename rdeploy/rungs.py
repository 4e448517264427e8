"""One step of a ladder as it lies in the store: what it proposed, how that did, and whether it is kept."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from rdeploy import serde
from rdeploy.adapt import Change
from rdeploy.adapted import Rung
from rdeploy.metrics.closeness import Closeness, Gain, helps
from rdeploy.types import Preprocessing, Variant

WEIGHTS = "weights.pt"
_PARTS = ("decided", "smooth")


@dataclass(frozen=True, slots=True, kw_only=True)
class Reached:
    """Where the ladder is: a variant, how it does on the judging images, and what the report says of the step."""

    variant: Variant
    rung: Rung
    agreed: Closeness
    correct: Closeness | None

    @property
    def decides(self) -> Closeness:
        """What steps are kept by: the labels where there are any, else the agreement with the native model."""
        return self.agreed if self.correct is None else self.correct


def save(folder: Path, change: Change, agreed: Closeness, correct: Closeness | None) -> None:
    """Write a step's weights, and how it did on each judging image: against the native model, and against the labels."""
    if change.state is not None:
        import torch

        torch.save(change.state, folder / WEIGHTS)
    found = {"agreed": agreed} | ({} if correct is None else {"correct": correct})
    np.savez(
        folder / "scores.npz",
        **{f"{name}_{part}": getattr(one, part) for name, one in found.items() for part in _PARTS},
    )


def told(folder: Path) -> dict[str, Any]:
    """Return what was written of a step besides its weights and scores."""
    found: dict[str, Any] = json.loads((folder / "step.json").read_text(encoding="utf-8"))
    return found


def read(folder: Path, name: str, now: Variant, before: Reached | None) -> Reached:
    """Return where a step has led from `now`; `before` is how that did, None for the first."""
    facts, (agreed, correct) = told(folder), _scores(folder)
    if facts["preprocessing"] is not None:
        now = replace(now, preprocessing=serde.from_json(Preprocessing, facts["preprocessing"], where="step.json"))
    if (folder / WEIGHTS).is_file():
        now = replace(now, weights=folder.name)
    decides = agreed if correct is None else correct
    gain = Gain(0.0, (0.0, 0.0)) if before is None else Gain.between(before.decides, decides)
    rung = Rung(
        step=name,
        kept=before is None or helps(before.decides, decides),
        agreement=agreed.share,
        accuracy=None if correct is None else correct.share,
        gain=100 * gain.value,
        gain_ci95=(100 * gain.ci95[0], 100 * gain.ci95[1]),
        detail=facts["detail"],
        seconds=facts["seconds"],
    )
    return Reached(variant=now, rung=rung, agreed=agreed, correct=correct)


def _scores(folder: Path) -> tuple[Closeness, Closeness | None]:
    with np.load(folder / "scores.npz", allow_pickle=False) as file:
        agreed = Closeness(*(file[f"agreed_{part}"] for part in _PARTS))
        if "correct_decided" not in file.files:
            return agreed, None
        return agreed, Closeness(*(file[f"correct_{part}"] for part in _PARTS))
