"""What a search looks at: a request and a target go in; FP32 variants come out, and what of the space is left out, and why."""

from __future__ import annotations

from dataclasses import replace

from rdeploy import expectations, pipeline, search
from rdeploy.compare import Row
from rdeploy.intake import Build
from rdeploy.types import Variant


def grid(this: Build, *, ladder: bool) -> list[Variant]:
    """Return every FP32 variant of the space: the places asked for, at the sizes asked for.

    Args:
        ladder: no size was asked for; places that do not say their own scale get a ladder of sizes.
    """
    request = replace(this.request, precisions=("fp32",))
    if ladder:
        request = replace(request, scales=(), resolutions=search.resolutions(this.spec.native_resolution)[1:])
    return pipeline.variants(replace(this, request=request))


def left_out(this: Build, baseline: Row) -> dict[str, str]:
    """Return the precisions and backends that cannot be searched here although they were asked for, with the reason."""
    found = {}
    for precision in this.request.precisions:
        if reason := _no_precision(this, precision):
            found[precision] = reason
    for name, built in baseline.built.items():
        if built.not_run is not None:
            found[name] = f"its engines cannot be measured on this machine: {built.not_run}"
    for name, result in baseline.results.items():
        if result.failure is not None:
            found[name] = f"it does not take the native model: {result.failure.stage}: {result.failure.message}"
    return found


def _no_precision(this: Build, precision: str) -> str | None:
    if precision == "fp16":
        return expectations.no_fp16(replace(this.target, backends=this.graphs_for))
    if precision in ("fp32", *this.target.precisions):
        return None
    return f"the profile of target {this.target.name} does not list {precision} under precisions"
