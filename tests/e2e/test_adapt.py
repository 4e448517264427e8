"""The ladder through the real command line: a training that is killed goes on, and what comes out is better and explained."""

import json
import os
import shutil
import signal
import time

import pytest

from rdeploy import bundle

from .conftest import Workplace

FINETUNE = (
    "build", "digits.pt", "--arch", "digits_model:digits_net", "--scale", "0.5", "--fp32", "--backend", "onnxruntime",
    "--finetune", "images", "--finetune-epochs", "16", "--finetune-batch", "16", "--target", "quick.yaml", "--out", "out",
)  # fmt: skip
BUNDLE = "digits-r16-fp32"


def manifest_of(place: Workplace) -> dict:
    return json.loads((place.folder / "out" / BUNDLE / "manifest.json").read_text())


def killed_in_training(place: Workplace) -> None:
    """Start the build and kill it as soon as its training has written a checkpoint."""
    child = place.start(*FINETUNE)
    deadline = time.monotonic() + 200
    while (
        not list(place.cache.glob("checkpoints/*/checkpoint.pt"))
        and child.poll() is None
        and time.monotonic() < deadline
    ):
        time.sleep(0.002)
    assert child.poll() is None, child.communicate()
    os.kill(child.pid, signal.SIGKILL)
    child.communicate()


@pytest.fixture(scope="module")
def places(trained, tmp_path_factory):
    """Two workplaces: in one the training was killed and the build started again, in the other nothing happened."""
    pytest.importorskip("torch", reason="training needs PyTorch")
    found = []
    for name in ("killed", "whole"):
        folder = tmp_path_factory.mktemp(name)
        shutil.copytree(trained, folder, dirs_exist_ok=True)
        found.append(Workplace(folder))
    killed_in_training(found[0])
    answers = [place.run(*FINETUNE) for place in found]
    for answer in answers:
        assert answer.returncode == 0, answer.stderr
    return found, answers


def test_a_training_that_was_killed_goes_on_and_ends_in_the_same_graph(places):
    (killed, whole), (resumed, straight) = places

    assert "goes on at step" in resumed.stderr
    assert "goes on at step" not in straight.stderr
    graphs = [manifest_of(place)["onnx"]["sha256"] for place in (killed, whole)]
    assert graphs[0] == graphs[1]
    assert not list(killed.cache.glob("checkpoints/*"))


def test_the_ladder_and_the_verdict_are_told_everywhere(places):
    (_, whole), (_, answer) = places
    manifest = manifest_of(whole)
    ladder = manifest["variant"]["adaptation"]
    steps = {rung["step"]: rung for rung in ladder["rungs"]}

    assert ladder["images"] == 64
    assert steps["distill"]["kept"]
    assert steps["distill"]["agreement"] > steps["plain"]["agreement"]
    assert manifest["verdict"]["verdict"] in ("usable", "needs fine-tuning", "dominated")
    assert "fine-tuning r16: from 208 images and labels, 16 epochs" in answer.stderr
    assert "epoch 16 of 16" in answer.stderr or "no progress in" in steps["distill"]["detail"]
    assert "r16, fine-tuning:" in answer.stderr
    report = (whole.folder / "out" / BUNDLE / "report.md").read_text()
    assert "## How the lower resolution was made good" in report
    assert "| r16 | fine-tuning |" in report


def test_a_second_build_trains_nothing(places):
    (_, whole), _ = places

    again = whole.run(*FINETUNE)

    assert again.returncode == 0, again.stderr
    assert "epoch" not in again.stderr.split("r16, fine-tuning:")[0]
    bundle.read(whole.folder / "out" / BUNDLE)
