"""Runs rdeploy as the peers are run: one ONNX file, one scheme, 8-bit weights whatever this CPU has.

python run_rdeploy.py MODEL.onnx CALIBRATION.npy OUT.onnx CONFIG     CONFIG: "affine auto", "symmetric thorough", ...

"openvino auto" is the affine form for OpenVINO, which differs from ONNX Runtime's for transformers.

"affine auto:0.69" leaves the layers in float that make the most error for their work (`rdeploy build --max-drop` ranks them
so), as long as that share of the multiply-accumulates stays in INT8: for a peer that leaves as many in float.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from rows import Clock, Rows

from rdeploy import __version__, backends, targets
from rdeploy.quantize import families, recipe, sensitivity
from rdeploy.types import QuantOptions


def costly(ranked: Sequence[sensitivity.Sensitivity], macs: float) -> tuple[str, ...]:
    """Return the layers that make the most error for each multiply-accumulate, as many as fit into a share of these."""
    kept = []
    for one in sorted(ranked, key=lambda one: -one.noise / max(one.macs, 1e-9)):
        if one.macs <= macs:
            kept.append(one.layer)
            macs -= one.macs
    return tuple(kept)


SCHEMES = {"affine": "onnxruntime", "openvino": "openvino", "symmetric": "tensorrt_rtx"}

source, calibration, out, config = sys.argv[1:5]
kind, chosen = config.split()
scheme = dataclasses.replace(backends.find(SCHEMES[kind]).scheme(targets.load("cpu")), weight_max=127)
clock = Clock()
with tempfile.TemporaryDirectory(prefix="rdeploy-compare-") as folder:
    images = Rows(calibration)
    chosen, _, share = chosen.partition(":")
    seen = recipe.calibrate(Path(source), Path(folder), schemes=[scheme], images=images, recipe=chosen)
    quantize = functools.partial(recipe.quantize, seen, Path(out), scheme=scheme, images=images)
    made = quantize(options=QuantOptions())
    if share:
        ranked = sensitivity.rank(Path(source), Path(out), families.scheme_for(chosen, scheme), images)
        made = quantize(options=QuantOptions(keep_float=costly(ranked, 1 - float(share))))
clock.answer(__version__, said=list(made.recipe))
