"""rdeploy's accuracy control in a process of its own, as its peer runs (`peer_nncf_control.py`).

python run_rdeploy_control.py MODEL.onnx IMAGES.npy DECISIONS.npy OUT.onnx MAX_DROP     MAX_DROP: in points
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from peak import peak_bytes
from rows import Rows, features

from rdeploy import __version__, backends, targets
from rdeploy.quantize import mixed, recipe, sensitivity
from rdeploy.quantize.ranges import float_outputs
from rdeploy.results import Quantization
from rdeploy.types import QuantOptions

source, images_file, decisions_file, out, max_drop = sys.argv[1:6]
images, decisions = Rows(images_file), np.load(decisions_file)
scheme = backends.find("openvino").scheme(targets.load("cpu"))


def drop(graph: Path) -> float:
    made = np.array([features(outputs[0]).argmax() for outputs in float_outputs(graph, images)])
    return 100 * float(np.mean(made != decisions))


def requantize(keep_float: tuple[str, ...]) -> Quantization:
    options = QuantOptions(keep_float=keep_float)
    return recipe.quantize(calibration, Path(out), scheme=scheme, images=images, options=options, pinned=pinned)


start = time.perf_counter()
with tempfile.TemporaryDirectory(prefix="rdeploy-control-") as folder:
    calibration, pinned = recipe.calibrate(Path(source), Path(folder), schemes=[scheme], images=images), recipe.Pinned()
    quantized = time.perf_counter() - start
    judge = mixed.Judge(drop, len(images), labelled=False, counted=True)
    made = mixed.control(
        Path(source), Path(out), scheme=scheme, images=images, requantize=requantize, judge=judge, max_drop=float(max_drop)
    )  # fmt: skip
found = made.fallbacks
assert found is not None  # `control` reports what it did
gradients = sensitivity.IMAGES if found.candidates else 0
facts = {
    "version": __version__, "seconds": time.perf_counter() - start, "peak_bytes": peak_bytes(), "calls": found.evaluations,
    "images": found.evaluations * len(images) + gradients, "fallbacks": len(found.layers),
}  # fmt: skip
print(json.dumps(facts))
