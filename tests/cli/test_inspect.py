import json
import runpy
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import rdeploy.graph
from rdeploy import bundle, cli
from rdeploy.results import Cost


@pytest.fixture
def cost(monkeypatch):
    """Stand in for the analysis of a graph: two quantized layers and a float one."""
    layers = tuple(
        types.SimpleNamespace(
            **dict(zip(("name", "op", "shape", "macs", "params", "activation_bytes", "precision"), row))
        )
        for row in (
            ("stem", "Conv", (1, 8, 4, 4), 3_000_000, 216, 512, "int8"),
            ("act", "Relu", (1, 8, 4, 4), 0, 0, 512, "fp32"),
            ("head", "Gemm", (1, 3), 1_000_000, 27, 12, "fp32"),
        )
    )
    fake = types.ModuleType("rdeploy.graph.cost")
    fake.seen = []
    fake.summarize = lambda path: Cost(macs=4_000_000, params=243, weight_bytes=972, activation_bytes=1024)
    fake.layers = lambda path: fake.seen.append(path) or layers
    monkeypatch.setitem(sys.modules, "rdeploy.graph.cost", fake)
    monkeypatch.setattr(rdeploy.graph, "cost", fake, raising=False)
    return fake


def test_inspect_of_a_bundle_says_what_was_built_and_what_it_costs(written, cost, capsys):
    assert cli.execute(["inspect", str(written)]) == 0

    shown = capsys.readouterr().out
    assert cost.seen == [written / "model.onnx"]
    assert "tiny int8 at 6 (native 8), for cpu" in shown
    assert "openvino 1.0 on a CPU, 0.0 MB; executed: 4 int8, 1 fp32" in shown
    assert "tensorrt_rtx 1.0 for sm_89" in shown
    assert "0.004 GMACs" in shown
    assert "3 layers: 1 int8, 2 fp32; Q/DQ covers 75.0 % of the MACs" in shown
    assert "8x4x4" in shown


def test_inspect_json_has_every_layer(written, cost, capsys, monkeypatch):
    monkeypatch.setattr(cost, "layers", lambda path: (Cost(macs=5, params=1, weight_bytes=1, activation_bytes=1),) * 0)

    assert cli.execute(["inspect", str(written), "--json"]) == 0

    document = json.loads(capsys.readouterr().out)
    assert document["cost"]["macs"] == 4_000_000
    assert (document["layers"], document["int8_share_of_macs"]) == ([], 0.0)
    assert document["manifest"]["variant"]["id"] == "r6-int8"


def test_inspect_shows_the_costliest_layers_unless_all_are_asked_for(written, cost, capsys, monkeypatch):
    monkeypatch.setattr("rdeploy.cli.inspect._LAYERS", 1)

    cli.execute(["inspect", str(written)])
    assert "the 1 layers with the most MACs of 3; --all shows every one" in capsys.readouterr().out

    cli.execute(["inspect", str(written), "--all"])
    shown = capsys.readouterr().out
    assert "Relu" in shown
    assert "--all" not in shown


def test_inspect_of_a_real_onnx_file_counts_its_parameters(tiny_onnx, capsys):
    pytest.importorskip("rdeploy.graph.cost", reason="the analysis of graphs is not there")

    assert cli.execute(["inspect", str(tiny_onnx), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["cost"]["params"], document["cost"]["macs"]) == (9, 9)
    assert "MatMul" in [layer["op"] for layer in document["layers"]]


def quantized_graph(path, *, rest_fp16, native=None):
    """Write an INT8 graph for images of 6 x 6, its other layers in FP16, or with the resize from `native` in front."""
    ir = pytest.importorskip("onnx_ir", reason="onnx-ir is not installed: pip install 'rdeploy[torch]'")
    from rdeploy.graph import embed, fp16
    from rdeploy.quantize import qdq
    from rdeploy.quantize.placement import place
    from rdeploy.types import Preprocessing, QuantScheme

    text = runpy.run_path(str(Path(__file__).parent.parent / "onnx_text.py"))
    weights = {"w": text["normal"](4, 3, 1, 1), "v": text["normal"](2, 4, 1, 1)}
    text["write"](path, "a = Conv(x, w) r = Relu(a) y = Conv(r, v)", x=(1, 3, 6, 6), **weights)
    model, scheme = ir.load(path), QuantScheme(name="s", activations="int8", ops=("Conv",))
    qdq.insert(model, place(model, scheme), {"x": (-3.0, 3.0), "r": (-8.0, 8.0)}, scheme)
    if rest_fp16:
        fp16.convert(model)
    if native:
        embed.embed(model, native, Preprocessing(mean=(0.5,) * 3, std=(0.25,) * 3))
    ir.save(model, path)


@pytest.mark.parametrize("embedded", [False, True])
@pytest.mark.parametrize("rest_fp16", [False, True])
def test_inspect_quant_runs_the_bundle_s_graph_on_images(written, tmp_path, capsys, monkeypatch, rest_fp16, embedded):
    quantized_graph(written / "model.onnx", rest_fp16=rest_fp16, native=(8, 8) if embedded else None)
    manifest = bundle.read(written)
    more = {"embedded": True, "input_size": [8, 8], "layout": "NHWC", "dtype": "uint8", "range": [0, 255]}
    manifest["model"]["preprocessing"] |= more if embedded else {}
    monkeypatch.setattr(bundle, "read", lambda path: manifest)
    pixels = np.random.default_rng(0).integers(0, 256, (20, 8, 8, 3), np.uint8)
    (tmp_path / "calib").mkdir()
    for index, picture in enumerate(pixels):
        Image.fromarray(picture).save(tmp_path / "calib" / f"{index:02}.png")

    assert cli.execute(["inspect", str(written), "--quant", "--calib", str(tmp_path / "calib"), "--json"]) == 0

    found = json.loads(capsys.readouterr().out)
    assert found["samples"] == 16
    assert len(found["tensors"]) == 2
    assert all(20 < tensor["own_db"] < 60 for tensor in found["tensors"])
    assert "the error" in found["first_place"]


def test_inspect_quant_lists_ranges_without_images(written, capsys):
    quantized_graph(written / "model.onnx", rest_fp16=True)

    assert cli.execute(["inspect", str(written), "--quant"]) == 0

    shown = capsys.readouterr().out
    assert "-8.06 .. 8" in shown
    assert "give images with --calib to see where the error enters" in shown
