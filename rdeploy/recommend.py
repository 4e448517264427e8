"""Which precision to deploy at one resolution: what was measured goes in, a choice with its two numbers comes out. Pure.

INT8 has to be worth it: at least `WORTH` times as fast as the best floating-point engine, shown by an interval that leaves 1
out, and within the budget of accuracy, or what can be borne where no budget was set.
Where it is not, the answer is the float precision, and says why: "INT8 does not pay: 1.02x over FP32 for -1.3 points".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from rdeploy.results import CurvePoint, Recommendation

WORTH = 1.05
FLOATS = ("fp32", "fp16")


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """The best engine of one precision: its latency, and the points lost against FP32 at the same resolution.

    `speedup` and `interval` are against the best floating-point engine. None where it was not measured.
    """

    precision: str
    backend: str
    p50_ms: float | None = None
    drop: float | None = None
    speedup: float | None = None
    interval: tuple[float, float] | None = None
    executed: str | None = None
    """The float type that its runtime computed in, where that is not its precision: bf16."""


def fastest(candidates: Sequence[Candidate], precisions: Sequence[str]) -> Candidate | None:
    """Return the fastest of the candidates of some precisions that were measured."""
    measured = [one for one in candidates if one.precision in precisions and one.p50_ms is not None]
    return min(measured, key=lambda one: (one.p50_ms or 0.0, one.precision), default=None)


def choose(
    place: str, candidates: Sequence[Candidate], *, max_drop: float | None = None, bearable: float | None = None
) -> Recommendation:
    """Return the precision to deploy at a place: the fastest INT8 that is worth it, else the fastest float.

    Args:
        candidates: one for each precision that was built, FP32 among them where it was measured.
        max_drop: how many points may be lost; None leaves it at `bearable`.
        bearable: how many a deployment can be expected to bear; None sets no limit.
    """
    best_float = fastest(candidates, FLOATS)
    quantized = [one for one in candidates if one.precision not in FLOATS]
    quantized.sort(key=lambda one: (one.p50_ms is None, one.p50_ms or 0.0))
    refused = [
        (one, why)
        for one in quantized
        if (why := _loses_too_much(one, max_drop, bearable) or _too_slow(one, best_float))
    ]
    worth = [one for one in quantized if one not in [other for other, _ in refused]]
    reasons = "; ".join(why for _, why in refused)
    if worth and worth[0].speedup is not None and best_float is not None:
        reason = f"{_title(worth[0])} pays: {_numbers(worth[0], best_float)}"
        return _chosen(place, worth[0], best_float, "; ".join([reason, *([reasons] if reasons else [])]))
    if refused and not worth:
        better = (
            best_float.precision if best_float else next((p for p in ("fp16", "fp32") if _has(candidates, p)), "fp32")
        )
        against = best_float or Candidate(precision=better, backend="")
        answer = replace(refused[0][0], precision=better, backend=against.backend)
        return _chosen(place, answer, against, f"{reasons}: {better.upper()} is the better choice")
    if best_float is not None and not quantized:
        return _chosen(place, best_float, None, f"{best_float.precision.upper()} is the fastest float here")
    return Recommendation(place=place, precision=None, reason="not measured here, so which precision pays is not known")


def priced(curve: Sequence[CurvePoint], *, layers: int, chosen_ms: float, float_ms: float) -> tuple[CurvePoint, ...]:
    """Return the curve of mixed precision with a modelled latency at every point.

    Two engines were measured: the one with `layers` in float, and FP32. Between them the latency is taken to be linear in
    the share of the multiply-accumulates that is in float.
    """
    share = next((point.float_macs for point in curve if point.layers == layers), 0.0)
    slope = (float_ms - chosen_ms) / (1 - share) if share < 1 else 0.0
    return tuple(replace(point, latency_ms=chosen_ms + slope * (point.float_macs - share)) for point in curve)


def _loses_too_much(one: Candidate, max_drop: float | None, bearable: float | None) -> str | None:
    limit = bearable if max_drop is None else max_drop
    if limit is None or one.drop is None or one.drop <= limit:
        return None
    allowed = f"{limit:g} allowed" if max_drop is not None else f"{limit:g} that are bearable without --max-drop"
    gained = f", for {one.speedup:.2f}x" if one.speedup is not None else ""
    return f"{_title(one)} loses {one.drop:.1f} points, more than the {allowed}{gained}"


def _too_slow(one: Candidate, best_float: Candidate | None) -> str | None:
    if best_float is None or one.speedup is None:
        return None
    if one.speedup < WORTH:
        return f"{_title(one)} does not pay: {_numbers(one, best_float)}"
    if one.interval is not None and one.interval[0] <= 1.0:
        return f"{_title(one)} may not pay: {_numbers(one, best_float)}, and the interval holds 1"
    return None


def _numbers(one: Candidate, best_float: Candidate) -> str:
    executed = f" (executed in {best_float.executed})" if best_float.executed else ""
    text = f"{one.speedup:.2f}x over {best_float.precision.upper()}{executed}"
    if one.interval is not None:
        text += f" [{one.interval[0]:.2f}, {one.interval[1]:.2f}]"
    if one.drop is None:
        return text
    return f"{text} for {-one.drop:+.1f} points" if round(one.drop, 1) else f"{text} without loss"


def _title(one: Candidate) -> str:
    return "mixed precision" if one.precision == "mixed" else one.precision.upper()


def _has(candidates: Sequence[Candidate], precision: str) -> bool:
    return any(one.precision == precision for one in candidates)


def _chosen(place: str, one: Candidate, best_float: Candidate | None, reason: str) -> Recommendation:
    return Recommendation(
        place=place,
        precision=one.precision,
        backend=one.backend,
        against=best_float.precision if best_float else None,
        speedup=one.speedup,
        drop=one.drop,
        reason=reason,
    )
