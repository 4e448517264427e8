"""What a node makes in another folder and another store is what the search would have made: it finds it, and works no more."""

import pytest

from rdeploy import intake, judging, node, pipeline, transfer
from rdeploy.pipeline import engines
from rdeploy.search_request import search_request
from rdeploy.types import QuantOptions, Variant

OPTIONS = {
    "arch": "digits_model:digits_net", "calib": "images", "calib_samples": 40, "data": "images", "target": "quick.yaml",
    "at": "input", "resolution": [16], "fp32": True, "int8": True, "backend": "onnxruntime", "recipe": "fast", "out": "run",
}  # fmt: skip
STAGES = ("export", "calibrate", "quantize", "build")
SMALL = Variant(resolution=(16, 16))
ROUNDED = Variant(resolution=(16, 16), precision="int8", quant=QuantOptions(recipe="fast", samples=40))


@pytest.fixture
def search(trained, tmp_path, monkeypatch):
    """A search in the folder of the trained network, and what it has said of its stages."""
    monkeypatch.setenv("RDEPLOY_CACHE", str(tmp_path / "search"))
    monkeypatch.chdir(trained)
    said = []
    this, _ = intake.take_in(search_request("digits.pt", OPTIONS | {"out": str(tmp_path / "run")}).build, said.append)
    return this, said


def test_what_a_node_judged_and_built_is_found_by_the_search(search, tmp_path, monkeypatch):
    this, said = search
    native = judging.native_row(this)
    outputs = engines.native_outputs(this, native)
    order = node.order_of(this, str(tmp_path / "no-mark"))
    common = transfer.pack(this.steps.store, [transfer.name_of(native.exported.onnx.path, this.steps.store)])
    with monkeypatch.context() as elsewhere:
        elsewhere.setenv("RDEPLOY_CACHE", str(tmp_path / "node"))
        elsewhere.chdir(tmp_path)
        why, judged = node.judge(order, SMALL, 48, dict, [common])
        reason, built = node.prepare(order, ROUNDED, dict, [common, judged])
    assert (why, reason) == ("", "")
    for parcel in (judged, built):
        transfer.unpack(parcel, this.steps.store)
    said.clear()

    found = judging.judge(this, native, SMALL, 48)
    row = pipeline.contained(this, ROUNDED, outputs)

    assert found.verification is not None
    assert row.built["onnxruntime"].verification.passed
    assert [line for line in said if line.startswith(STAGES)] == []
