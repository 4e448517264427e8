"""Samples go in, an estimate with its uncertainty and confidence intervals come out: the statistics behind a verdict.

Times are compared as logarithms of ratios. The unit of repetition is a *launch*: fresh processes for both sides, timed
in interleaved rounds. Two processes with the same engine differ for as long as they live, so runs inside one process
are not independent samples; the launches are (Kalibera and Jones, "Rigorous Benchmarking in Reasonable Time", ISMM
2013). Student's t over the launches therefore holds what one process can never show.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean, variance

from rdeploy.errors import InvariantError

MAX_LAUNCHES = 1000
"""More than these are no advice: the change is too close to the budget."""

Interval = tuple[float, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A mean, the variance of that mean, and the degrees of freedom behind the variance (infinity: known)."""

    mean: float
    variance: float
    freedom: float

    def interval(self, alpha: float) -> Interval:
        """Return the two-sided interval that misses the truth with probability `alpha`."""
        half = quantile(1 - alpha / 2, self.freedom) * math.sqrt(self.variance) if self.variance else 0.0
        return self.mean - half, self.mean + half

    def __neg__(self) -> Estimate:
        return Estimate(mean=-self.mean, variance=self.variance, freedom=self.freedom)


def of_samples(samples: Sequence[float]) -> Estimate:
    """Return the mean of independent samples, one a launch.

    Raises:
        InvariantError: fewer than two, which say nothing about how far they scatter.
    """
    if len(samples) < 2:
        raise InvariantError(f"an interval needs at least two launches, not {len(samples)}")
    return Estimate(mean=fmean(samples), variance=variance(samples) / len(samples), freedom=len(samples) - 1)


def paired(current: Sequence[float], baseline: Sequence[float]) -> Estimate:
    """Return log(current / baseline) from launches that held both sides, so that what disturbed one disturbed both."""
    return of_samples([math.log(mine / theirs) for mine, theirs in zip(current, baseline, strict=True)])


def assumed(mean: float, *, deviation: float) -> Estimate:
    """Return an estimate whose standard deviation was not measured but is known from elsewhere."""
    return Estimate(mean=mean, variance=deviation**2, freedom=math.inf)


def difference(first: Estimate, second: Estimate) -> Estimate:
    """Return first - second of two independent estimates (Welch and Satterthwaite's degrees of freedom)."""
    total = first.variance + second.variance
    terms = [one.variance**2 / one.freedom for one in (first, second) if math.isfinite(one.freedom)]
    freedom = total**2 / sum(terms) if sum(terms) > 0 else math.inf
    return Estimate(mean=first.mean - second.mean, variance=total, freedom=freedom)


def quantile(probability: float, freedom: float) -> float:
    """Return the quantile of Student's t, or of the normal distribution for infinite degrees of freedom."""
    if math.isinf(freedom):
        return NormalDist().inv_cdf(probability)
    from scipy.special import stdtrit  # scipy.stats has the same and takes seconds to import

    return float(stdtrit(freedom, probability))


def spent(alpha: float, look: int) -> float:
    """Return the share of `alpha` that look 1, 2, 3 ... at growing data may spend: alpha / (look * (look + 1)).

    The shares of all looks, however many there will be, add up to `alpha`; by the union bound the error of stopping at
    any of them stays below it (alpha spending: Lan and DeMets, Biometrika 1983).
    """
    return alpha / (look * (look + 1))


def next_look(launches: int) -> int:
    """Return how many launches there are at the next look: half as many again, at least one more."""
    return launches + max(1, launches // 2)


def launches_needed(estimate: Estimate, *, launches: int, distance: float, alpha: float) -> int | None:
    """Return how many launches in all would make the interval's half width smaller than `distance`.

    Takes the scatter between the launches as it was; None where it would be more than 1000.
    """
    deviation = math.sqrt(estimate.variance * launches)
    for count in range(max(2, launches), MAX_LAUNCHES + 1):
        if quantile(1 - alpha / 2, count - 1) * deviation / math.sqrt(count) < distance:
            return count
    return None


def share_difference(drop: int, discordant: int, samples: int, *, alpha: float) -> Interval:
    """Return the interval of how much smaller one share is than another of the same `samples` (fractions).

    Args:
        drop: how many fewer the second counts.
        discordant: on how many samples the two disagree, or at most disagree: more makes the interval wider.

    The adjusted Wald interval for paired shares of Bonett and Price (Psychometrika 2012): it holds its level for small
    samples and no disagreement too.
    """
    lost, won = ((discordant + sign * drop) / 2 for sign in (1, -1))
    p_lost, p_won = (lost + 1) / (samples + 2), (won + 1) / (samples + 2)
    middle = p_lost - p_won
    deviation = math.sqrt(max(0.0, p_lost + p_won - middle**2) / (samples + 2))
    half = NormalDist().inv_cdf(1 - alpha / 2) * deviation
    return max(-1.0, middle - half), min(1.0, middle + half)
