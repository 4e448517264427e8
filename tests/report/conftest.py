import base64
import io
import json
import shutil

import numpy as np
import pytest

from rdeploy import bundle

STEPS = (("r224-int8", 224, "int8", 4.0, 89.0), ("r192-int8", 192, "int8", 3.0, 87.0), ("r168-int8", 168, "int8", 2.3, 84.0),
         ("r168-fp32", 168, "fp32", 4.4, 85.0), ("r112-int8", 112, "int8", 1.1, 62.0))  # fmt: skip


def picture(seed):
    from PIL import Image

    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 255, (12, 12, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((160, 160)).save(file, "JPEG")
    return base64.b64encode(file.getvalue()).decode()


@pytest.fixture
def native_bundle(run):
    """One more bundle in the same folder: the native model's own, as a search writes it."""
    target = run / "net-r224-fp32"
    shutil.copytree(run / "net-r224-int8", target)
    manifest = json.loads((target / "manifest.json").read_text())
    manifest["variant"].update(id="r224-fp32", precision="fp32")
    for engine in manifest["engines"]:
        engine["comparison"] = None
    (target / "manifest.json").write_text(json.dumps(manifest))
    bundle.seal(target)
    return target


@pytest.fixture
def run(written, tmp_path):
    """A folder with five bundles whose manifests tell of five points."""
    folder = tmp_path / "run"
    for name, side, precision, p50_ms, accuracy in STEPS:
        target = folder / f"net-{name}"
        shutil.copytree(written, target)
        _tell(target, name, side, precision, p50_ms, accuracy)
    return folder


def _tell(target, name, side, precision, p50_ms, accuracy):
    manifest = json.loads((target / "manifest.json").read_text())
    manifest["variant"].update(id=name, resolution=[side, side], precision=precision)
    manifest["baseline"].update(id="r224-fp32", resolution=[224, 224])
    manifest["baseline"]["measurement"]["p50_ms"] = 5.0
    for engine in manifest["baseline"]["engines"]:
        engine["p50_ms"] = 5.0 if engine["backend"] == "openvino" else 6.5
    manifest["cost"]["macs"] = side * side * 8000
    for index, engine in enumerate(e for e in manifest["engines"] if e["measurement"]):
        slower = 1 + 0.3 * index
        engine["measurement"]["p50_ms"] = p50_ms * slower
        engine["comparison"] = {
            "backend": engine["backend"], "speedup": 5.0 / p50_ms, "speedup_ci95": [4.9 / p50_ms, 5.1 / p50_ms],
            "memory_ratio": 0.9, "size_ratio": 0.3, "verdict": "faster",
        }  # fmt: skip
        scored = engine["verification"]["accuracy"]
        scored.update(value=accuracy / 100, reference=0.9, ci95=[accuracy / 100 - 0.03, accuracy / 100 + 0.03])
    (target / "manifest.json").write_text(json.dumps(manifest))
    entry = {
        "name": "a.jpg",
        "jpeg": picture(side),
        "native": "tabby 81 %",
        "variant": "tiger cat 55 %",
        "label": "tabby",
    }
    (target.parent / "disagreements").mkdir(exist_ok=True)
    (target.parent / "disagreements" / f"{target.name}.json").write_text(json.dumps([entry]))
    bundle.seal(target)
