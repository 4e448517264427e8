"""What kind of network a graph is, and which steps of quantization are worth trying on it: a graph goes in, a `Recipe` comes out.

The kind is read from the operators, never from a name. Every step is measured on calibration images and dropped where it
gains nothing; a recipe only says which ones are worth the time.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import onnx_ir as ir

from rdeploy.errors import ConfigError
from rdeploy.plugins import did_you_mean
from rdeploy.quantize.placement import has_attention, is_patch_embedding, weight_of
from rdeploy.types import QuantScheme

AUTO = "auto"


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Which calibrators are tried, whether channels are equalized and smoothed, and which repairs of the weights are tried.

    `finish`: the repairs that take minutes, tried on the graph that came closest alone.

    `products`: which of attention's products are quantized, `patches`: whether the patch embedding is (`QuantScheme`).
    """

    calibrators: tuple[str, ...] = ("minmax", "percentile", "mean_extremes", "mse", "gradient")
    equalize: bool = True
    smooth: bool = False
    products: str = "none"
    patches: bool = False
    repairs: tuple[str, ...] = ("bias_correction", "error_feedback")
    finish: tuple[str, ...] = ()


RECIPES = {
    "plain": Recipe(),
    "depthwise": Recipe(),
    "dense": Recipe(),
    "hybrid": Recipe(smooth=True),
    # Percentiles cut what attention needs: its outliers are its register of where to look.
    "vit": Recipe(calibrators=("minmax", "mean_extremes", "mse", "gradient"), smooth=True),
    "windowed": Recipe(calibrators=("minmax", "mean_extremes", "mse", "gradient"), smooth=True),
    # One range cannot hold 1 and a thousandth: products of probabilities cost more than all the rest.
    "scores": Recipe(
        calibrators=("minmax", "mean_extremes", "mse", "gradient"), smooth=True, products="scores", patches=True
    ),
    "attention": Recipe(
        calibrators=("minmax", "mean_extremes", "mse", "gradient"), smooth=True, products="all", patches=True
    ),
    "fast": Recipe(calibrators=("minmax",), equalize=False, repairs=("bias_correction",)),
    "thorough": Recipe(
        smooth=True,
        repairs=(
            "analytic_bias_correction",
            "bias_correction",
            "sequential_bias_correction",
            "error_feedback",
        ),
        finish=("adaptive_rounding",),
    ),
}
"""By name: a kind of network, or what the user asks for (`--recipe`): the least time, or the least error."""


def family(graph: ir.Graph) -> str:
    """Return the kind of network: plain, depthwise, dense, vit, windowed or hybrid."""
    convolutions = [node for node in graph if node.op_type == "Conv" and not is_patch_embedding(node)]
    if has_attention(graph):
        if any(len(node.outputs[0].shape or ()) >= 6 for node in graph if node.op_type in ("Reshape", "Transpose")):
            return "windowed"
        return "hybrid" if len(convolutions) > 2 else "vit"
    if any(output.shape is not None and _is_map(output.shape) for output in graph.outputs):
        return "dense"
    depthwise = sum(_is_depthwise(node) for node in convolutions)
    return "depthwise" if depthwise * 5 >= len(convolutions) > 0 else "plain"


def find(name: str, graph: ir.Graph) -> tuple[str, Recipe]:
    """Return the recipe of that name; "auto" is that of the graph's family, with smoothing where there is something to smooth.

    Raises:
        ConfigError: there is none of that name.
    """
    chosen = family(graph) if name == AUTO else name
    if chosen not in RECIPES:
        known = (AUTO, *RECIPES)
        raise ConfigError(f"unknown recipe {name!r}{did_you_mean(name, known)}; there are: {', '.join(known)}")
    steps = RECIPES[chosen]
    return chosen, replace(steps, smooth=True) if name == AUTO and _has_bent_linears(graph) else steps


def scheme_for(recipe: str, scheme: QuantScheme) -> QuantScheme:
    """Return a runtime's scheme with what a recipe quantizes besides."""
    steps = RECIPES.get(recipe, Recipe())
    return replace(scheme, products=steps.products, patches=steps.patches)


def _has_bent_linears(graph: ir.Graph) -> bool:
    """Whether there are Linear layers and GELUs, as in the blocks of transformers: ConvNeXt and mixers have them as well."""
    operators = {node.op_type for node in graph if node.op_type != "MatMul" or weight_of(node) is not None}
    return "MatMul" in operators and not operators.isdisjoint(("Gelu", "Erf"))


def _is_map(shape: ir.Shape) -> bool:
    sides = list(shape)
    return len(sides) == 4 and any(not isinstance(side, int) or side > 1 for side in sides[2:])


def _is_depthwise(node: ir.Node) -> bool:
    weight = weight_of(node)
    groups = node.attributes["group"].as_int() if "group" in node.attributes else 1
    return groups > 1 and weight is not None and weight.shape is not None and weight.shape[1] == 1
