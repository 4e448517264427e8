import json
import sys
import types

import pytest

import rdeploy.graph
from rdeploy import cli
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
