"""The reduced list of architectures comes down the whole line, and what does not is told apart."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import architectures, coverage
from rdeploy.errors import StageError

ROOT = Path(__file__).parents[1]


def line(model, status="done", reason="", **engines):
    shown = {name.replace("_", "/", 1): {"status": "done", "reason": "", "sqnr_db": 30.5} for name in engines}
    return {
        "model": model, "status": status, "reason": reason, "engines": shown, "resolution": [168, 168],
        "seconds": 3.2, "peak_mb": 900,
    }  # fmt: skip


def test_there_are_enough_architectures_each_once():
    assert len(set(architectures.ARCHITECTURES)) == len(architectures.ARCHITECTURES) >= 80
    assert {"timm:shvit_s4", "timm:fastvit_mci3", "timm:vitamin_small_224", "hf:microsoft/cvt-13"} <= set(
        architectures.ARCHITECTURES
    )


def test_timm_knows_them_all():
    timm = pytest.importorskip("timm", reason="timm is not installed (extra: zoo)")
    names = [model.removeprefix("timm:") for model in architectures.ARCHITECTURES if model.startswith("timm:")]

    assert [name for name in names if not timm.is_model(name)] == []


def test_the_page_counts_what_is_done_and_gives_every_other_its_reason():
    found = {
        "timm:resnet18": line("timm:resnet18", fp32_openvino=1),
        "timm:swin": line("timm:swin", "refused", "its windows | do not fit"),
        "timm:x": line("timm:x", "exporter", "export: PyTorch's exporter stopped: X"),
    }

    page = coverage.table(found)

    assert "3 architectures with random weights" in page
    assert "done 1, refused in plain words 1, PyTorch's exporter 1 (33 % done)" in page
    assert "| timm:swin | refused in plain words | its windows \\| do not fit |" in page
    assert "| timm:resnet18 | 168 | – | 30.5 | – | – | – | – | 3 | 900 |" in page


@pytest.mark.parametrize(
    ("limits", "reason"),
    [
        ({"limit_s": 0.3, "limit_gb": 8.0}, "took more than 0.3 s"),
        ({"limit_s": 60.0, "limit_gb": 1e-6}, "took more than 1e-06 GB"),
    ],
)
def test_a_child_that_takes_too_much_is_ended_and_told(monkeypatch, tmp_path, limits, reason):
    (tmp_path / "sleeper.py").write_text("import time; time.sleep(120)")
    monkeypatch.setattr(coverage, "__file__", str(tmp_path / "sleeper.py"))

    found = coverage.run("timm:resnet18", data="random", **limits)

    assert (found["status"], found["reason"]) == ("failed", reason)


def test_a_network_that_says_nothing_yet_is_woken():
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    nn, spec = torch.nn, SimpleNamespace(channels=3, native_resolution=(16, 16))
    torch.manual_seed(0)
    zero, talking = nn.Linear(4, 5), nn.Linear(4, 5)
    nn.init.zeros_(zero.weight)

    def net(head):
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), head).eval()

    dumb = net(zero)

    assert not coverage.wake(net(talking), spec)
    assert coverage.wake(dumb, spec)
    assert not coverage.wake(dumb, spec)
    assert not dumb.training
    assert zero.weight.any()


def test_a_network_that_cannot_be_woken_is_not_done():
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    blind = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(768, 2), torch.nn.ReLU6())
    torch.nn.init.constant_(blind[1].bias, 1e6)

    with pytest.raises(StageError, match="its answers hardly depend on the image"):
        coverage.wake(blind.eval(), SimpleNamespace(channels=3, native_resolution=(16, 16)))


@pytest.mark.slow
@pytest.mark.parametrize("model", architectures.REDUCED)
def test_the_reduced_list_is_done(model, tmp_path):
    pytest.importorskip("timm", reason="timm is not installed (extra: zoo)")
    pytest.importorskip("tensorrt_rtx_bindings", reason="TensorRT-RTX is not installed (extra: rtx)")
    out = tmp_path / "coverage.md"

    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks/coverage.py"), "--only", model, "--out", str(out)],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    (told,) = (json.loads(text) for text in out.with_suffix(".jsonl").read_text().splitlines())
    assert (told["status"], told["reason"]) == ("done", "")
    assert set(told["engines"]) == {f"{p}/{b}" for p in ("fp32", "int8") for b in coverage.BACKENDS}
    assert "(100 % done)" in out.read_text()
