"""Two snapshots and the budgets go in, a verdict on every metric comes out.

Counts are compared exactly, shares of images by a paired interval, times and memory by intervals over launches; what was
measured on another machine or otherwise is not compared, and the ratios to the native model decide in its place.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence

from rdeploy import evidence, intervals
from rdeploy.budgets import Rules
from rdeploy.evidence import SHARES, Evidence
from rdeploy.snapshot import MACHINE, SOFTWARE, EngineFacts, Share, Snapshot, differences
from rdeploy.verdicts import (
    IMPROVEMENT,
    INCONCLUSIVE,
    NOT_COMPARABLE,
    PASS,
    REGRESSION,
    Finding,
    decide,
    judge,
    sign,
    unsettled,
)

COUNTS = ("macs", "params", "weight_bytes", "activation_bytes", "onnx_bytes", "nodes", "qdq_coverage")


def compare(
    current: Snapshot,
    baseline: Snapshot,
    rules: Rules,
    *,
    paired: bool = False,
    looks: Mapping[str, int] | None = None,
) -> tuple[Finding, ...]:
    """Return the verdict on every metric that has a budget.

    Args:
        paired: launch i of both snapshots was measured in the same interleaved rounds (`--rerun-baseline`).
        looks: per backend, the n-th look at growing data, which spends its share of the error; None: the only look.
    """
    elsewhere = () if paired else differences(current, baseline, MACHINE)
    findings = [*_counts(current, baseline, rules)]
    for theirs in baseline.engines:
        mine = current.engine(theirs.backend)
        if mine is None or (mine.failure and not theirs.failure):
            findings.append(_lost(theirs.backend, mine))
            continue
        look = (looks or {}).get(theirs.backend)
        alpha = rules.alpha if look is None else intervals.spent(rules.alpha, look)
        findings += _measured(mine, theirs, rules, paired=paired, elsewhere=elsewhere, alpha=alpha)
        findings += _sized(mine, theirs, rules)
        for metric in ("accuracy", "agreement"):
            findings += _share(metric, mine, theirs, rules)
    return tuple(findings)


def notes(current: Snapshot, baseline: Snapshot) -> tuple[str, ...]:
    """Return what is to be said about the machines and the software that differ."""
    lines = []
    if other := differences(current, baseline, MACHINE):
        lines.append(f"another machine: {', '.join(other)}; ratios and counts decide, absolute times and bytes do not")
    if "cpu_flags" in " ".join(other):
        lines.append("the CPUs' features differ, and with them what INT8 and BF16 gain: expect other speed-ups")
    if software := differences(current, baseline, SOFTWARE):
        lines.append(f"other software: {', '.join(software)}")
    return tuple(lines)


def _counts(current: Snapshot, baseline: Snapshot, rules: Rules) -> Iterator[Finding]:
    for metric in COUNTS:
        budget = rules.of(metric, None)
        if budget is None or metric not in baseline.counts:
            continue
        before = baseline.counts[metric]
        if metric not in current.counts:
            yield _apart(metric, None, f"the baseline has {_number(before)}, it was not counted here")
            continue
        yield _exact(metric, None, current.counts[metric], before, budget, basis="counted in the graph")


def _sized(mine: EngineFacts, theirs: EngineFacts, rules: Rules) -> Iterator[Finding]:
    budget = rules.of("size", mine.backend)
    if budget is not None and mine.size_bytes is not None and theirs.size_bytes:
        yield _exact("size", mine.backend, mine.size_bytes, theirs.size_bytes, budget, basis="bytes of the engine")


def _exact(metric: str, backend: str | None, now: float, before: float, budget: float, *, basis: str) -> Finding:
    """Judge a number that does not vary: its interval is itself."""
    if metric not in SHARES and (before <= 0 or now <= 0):
        same = now == before
        result = PASS if same else REGRESSION if now > before else IMPROVEMENT
        return Finding(metric=metric, backend=backend, verdict=result, baseline=before, current=now, basis=basis)
    worse = before - now if metric in SHARES else math.log(now / before) * sign(metric)
    known = Evidence(worse=intervals.assumed(worse, deviation=0.0), baseline=before, current=now, basis=basis)
    return judge(metric, backend, known, budget, alpha=1.0)


def _measured(
    mine: EngineFacts, theirs: EngineFacts, rules: Rules, *, paired: bool, elsewhere: Sequence[str], alpha: float
) -> Iterator[Finding]:
    for metric, read in evidence.OF_A_LAUNCH.items():
        budget = rules.of(metric, mine.backend)
        now, before = evidence.values(mine.launches, read), evidence.values(theirs.launches, read)
        if budget is None or not before:
            continue
        busy = _busy(mine, theirs) if metric != "memory" else ()
        reasons = () if paired else (*elsewhere, *_other_settings(mine, theirs), *busy)
        if reasons:
            yield _apart(metric, mine.backend, f"not measured alike: {'; '.join(reasons)}")
        elif not now:
            yield _apart(metric, mine.backend, "not measured here")
        else:
            side_by_side = paired and len(now) == len(before) >= 2
            weigh = evidence.side_by_side if side_by_side else evidence.on_two_occasions
            yield judge(metric, mine.backend, weigh(metric, now, before), budget, alpha=alpha)
    for metric in () if paired else ("speedup", "memory_ratio"):
        budget = rules.of(metric, mine.backend)
        first, second = evidence.against_native(metric, mine), evidence.against_native(metric, theirs)
        if budget is None or second is None:
            continue
        if first is None:
            yield _apart(metric, mine.backend, "not measured against the native model here")
        elif other := _other_settings(mine, theirs):
            yield _apart(metric, mine.backend, f"not measured alike: {'; '.join(other)}")
        else:
            known = evidence.ratio_of_ratios(metric, first, second)
            basis = "; ".join((known.basis, *_busy(mine, theirs)))
            yield judge(metric, mine.backend, dataclasses.replace(known, basis=basis), budget, alpha=alpha)


def _other_settings(mine: EngineFacts, theirs: EngineFacts) -> tuple[str, ...]:
    """Return in which ways the two were not measured alike."""
    pairs = (("batch", mine.batch, theirs.batch), ("threads", mine.threads, theirs.threads))
    found = [f"{name} {then or 'all'} -> {now or 'all'}" for name, now, then in pairs if now != then]
    if mine.definition and theirs.definition and mine.definition != theirs.definition:
        found.append(f"latency is {theirs.definition!r} there and {mine.definition!r} here")
    return tuple(found)


def _busy(mine: EngineFacts, theirs: EngineFacts) -> tuple[str, ...]:
    """Return where the machine was too busy for its times to be compared with another occasion's."""
    return tuple(
        f"load {one.load:.1f} on {one.cores} cores {when}"
        for when, one in (("now", mine), ("then", theirs))
        if one.load is not None and one.cores is not None and one.load > one.cores
    )


def _share(metric: str, mine: EngineFacts, theirs: EngineFacts, rules: Rules) -> Iterator[Finding]:
    budget = rules.of(metric, mine.backend)
    now: Share | None = getattr(mine, metric)
    before: Share | None = getattr(theirs, metric)
    if budget is None or before is None:
        return
    if now is None or now.samples != before.samples:
        there = f"scored on {before.samples} images in the baseline, on {now.samples if now else 'none'} here"
        yield _apart(metric, mine.backend, there)
        return
    discordant, basis = _discordant(now, before)
    drop = before.right - now.right
    low, high = intervals.share_difference(drop, discordant, now.samples, alpha=rules.alpha)
    result = decide((low, high), budget, budget)
    needed = None
    if result == INCONCLUSIVE:
        needed = _images_needed(drop, discordant, now.samples, budget, rules.alpha)
    shares = before.right / now.samples, now.right / now.samples
    yield Finding(
        metric=metric,
        backend=mine.backend,
        verdict=result,
        baseline=shares[0],
        current=shares[1],
        change=shares[1] - shares[0],
        interval=(-high, -low),
        budget=budget,
        basis=basis,
        reason=unsettled("images", needed) if result == INCONCLUSIVE else "",
        needed=needed,
    )


def _discordant(now: Share, before: Share) -> tuple[int, str]:
    """Return on how many images the two disagree: counted where both say so image by image, else the most it can be."""
    if now.images and now.images == before.images and len(now.per_image) == len(before.per_image) == now.samples:
        count = sum(a != b for a, b in zip(now.per_image, before.per_image))
        return count, f"{now.samples} images, one by one: {count} decided differently"
    wrong = 2 * now.samples - now.right - before.right
    return min(wrong, now.right + before.right), f"{now.samples} images, totals only (--data compares one by one)"


def _images_needed(drop: int, discordant: int, samples: int, budget: float, alpha: float) -> int | None:
    """Return how many images more would settle it if they behave as these did, None where 1000 times as many do not."""
    factor = 1.0
    while (factor := factor * 1.1) < 1000:
        count = round(samples * factor)
        interval = intervals.share_difference(round(drop * factor), round(discordant * factor), count, alpha=alpha)
        if decide(interval, budget, budget) != INCONCLUSIVE:
            return count - samples
    return None


def _lost(backend: str, mine: EngineFacts | None) -> Finding:
    why = "the baseline has this engine, the current variant does not" if mine is None else mine.failure
    return Finding(metric="engine", backend=backend, verdict=REGRESSION, reason=why)


def _apart(metric: str, backend: str | None, reason: str) -> Finding:
    return Finding(metric=metric, backend=backend, verdict=NOT_COMPARABLE, reason=reason)


def _number(value: float) -> str:
    return f"{value:g}"
