"""Confidence intervals, against published values."""

import numpy as np
import pytest

from rdeploy.metrics.intervals import wilson_interval


@pytest.mark.parametrize(
    ("share", "samples", "expected"),
    [(0.0, 10, (0.0, 0.2775)), (1.0, 10, (0.7225, 1.0)), (0.5, 100, (0.4038, 0.5962)), (0.9, 50, (0.7864, 0.9565))],
)
def test_wilson_interval_matches_published_values(share, samples, expected):
    assert wilson_interval(share, samples) == pytest.approx(expected, abs=5e-5)


def test_wilson_interval_covers_as_it_says():
    rng = np.random.default_rng(0)
    hits = rng.binomial(60, 0.8, 4000)
    covered = [low <= 0.8 <= high for low, high in (wilson_interval(h / 60, 60) for h in hits)]

    assert 0.93 <= np.mean(covered) <= 0.975
    assert wilson_interval(0.0, 0) == (0.0, 1.0)
