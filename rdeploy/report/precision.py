"""What a report says about precisions: a build's result goes in, sentences come out; the command line prints some of them."""

from __future__ import annotations

from rdeploy.results import BuildResult


def fp16(result: BuildResult) -> list[str]:
    """Say what of each variant is FP16, and which layers are not, with the reason."""
    lines = []
    for row in result.variants:
        if (found := row.fp16) is None:
            continue
        usual = [layer for layer, why in found.kept if why in _USUAL]
        lines.append(
            f"{row.variant.id}: {found.layers - len(found.kept)} of {found.layers} float layers in FP16 with {found.casts} "
            f"casts, {len(usual)} in FP32 because they accumulate; overflow looked for on {found.samples} images"
        )
        if found.denormals:
            lines.append(
                f"{row.variant.id}: {found.denormals / found.weights:.2%} of the weights are below FP16's normal range"
            )
        lines += [f"{row.variant.id}: {layer} stays FP32: {why}" for layer, why in found.kept if why not in _USUAL]
    return lines


_USUAL = ("accumulates", "has a large range", "divides by an activation", "lies between layers in FP32")


def recommendations(result: BuildResult) -> list[str]:
    """Say at each place which precision to deploy, with the numbers."""
    return [
        f"{one.place}: {one.precision.upper() if one.precision else 'no answer'}; {one.reason}"
        for one in result.recommendations
    ]


def fallbacks(result: BuildResult) -> list[str]:
    """Say what accuracy control did: the curve, and the layers that stay in float."""
    lines = []
    for row in result.variants:
        found = row.quantization.fallbacks if row.quantization else None
        if found is None:
            continue
        judged = "labels" if found.labelled else "the decisions of FP32"
        lines.append(
            f"{row.variant.id}: {len(found.layers)} layers in float for at most {found.max_drop:g} points against {judged} on "
            f"{found.samples} images; {found.evaluations} graphs judged"
        )
        for point in found.curve:
            latency = f", {point.latency_ms:.2f} ms modelled" if point.latency_ms is not None else ""
            lines.append(
                f"{row.variant.id}: {point.layers} in float ({100 * point.float_macs:.1f} % of the MACs): "
                f"{point.drop:.2f} points lost{latency}"
            )
        lines += [f"{row.variant.id}: {layer} made {100 * share:.0f} % of the error" for layer, share in found.layers]
        if found.latency_model:
            lines.append(f"{row.variant.id}: modelled latency on {found.latency_model}")
    return lines
