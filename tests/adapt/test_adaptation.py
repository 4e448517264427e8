"""The ladder without the command line: what it keeps, what it leaves alone, and that it does nothing twice."""

import copy
import dataclasses
from pathlib import Path

import numpy as np
import pytest

from rdeploy.build_request import BuildRequest
from rdeploy.data import images
from rdeploy.store import Store
from rdeploy.types import ModelSpec, Preprocessing, Target, Variant

from .conftest import blobs

torch = pytest.importorskip("torch", reason="the ladder exports networks with PyTorch")
pytest.importorskip("onnxruntime", reason="the ladder executes graphs with ONNX Runtime")

from rdeploy import adapt, adaptation, splits  # noqa: E402
from rdeploy.adapt import distill  # noqa: E402
from rdeploy.intake import Build  # noqa: E402
from rdeploy.models import Loaded  # noqa: E402
from rdeploy.steps import Steps, export  # noqa: E402
from rdeploy.steps.model import LazyModel  # noqa: E402

PLAIN = Preprocessing(mean=(0.5,) * 3, std=(0.25,) * 3, interpolation="bilinear", crop_pct=1.0)
SPEC = ModelSpec(name="net", source="net", sha256="ab", native_resolution=(16, 16), preprocessing=PLAIN)
REDUCED = Variant(resolution=(8, 8), precision="int8")


class Reduced(torch.nn.Module):
    """A trained network whose BatchNorm lets nothing through at any size but its own."""

    def __init__(self, net):
        super().__init__()
        self.native, self.small = copy.deepcopy(net), copy.deepcopy(net)
        self.small[1].running_mean += 1000

    def forward(self, x):
        return self.native(x) if x.shape[2] == 16 else self.small(torch.nn.functional.interpolate(x, scale_factor=2.0))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    pixels, kinds = blobs(160, seed=3)
    np.savez(folder / "images.npz", images=pixels, labels=kinds)
    return images.collect(folder / "images.npz", labelled=True)


def _nothing(message):
    """Nobody looks."""


def build(tmp_path, pictures, module, *, told=None, **request):
    steps = Steps(
        target=Target(name="cpu", backends=("onnxruntime",)), store=Store(tmp_path), progress=(told or []).append
    )
    model = LazyModel(SPEC, None, lambda: Loaded(spec=SPEC, module=module))
    asked = BuildRequest(model="net", calib="images", **request)
    return Build(request=asked, steps=steps, model=model, calib=pictures, judged=pictures)


def test_what_helps_is_kept_and_the_exported_graph_has_it(trained, pictures, tmp_path):
    told = []
    this = build(tmp_path, pictures, Reduced(trained).eval(), told=told, data="images")

    variant, ladder = adaptation.adapted(this, REDUCED)

    steps = {rung.step: rung for rung in ladder.rungs}
    assert (ladder.metric, ladder.images, ladder.chosen_on) == ("accuracy", 80, 80)
    assert ladder.native_accuracy > 0.9
    assert "batchnorm" in ladder.kept
    assert steps["batchnorm"].accuracy > steps["plain"].accuracy + 0.2
    assert steps["batchnorm"].gain == pytest.approx(100 * (steps["batchnorm"].accuracy - _before(ladder)), abs=1e-6)
    assert variant.weights
    assert (variant.precision, variant.id) == ("int8", "r8-int8")
    own, adapted = (export.exported(this.steps, this.model, one, pictures).onnx for one in (REDUCED, variant))
    assert own.sha256 != adapted.sha256


def _before(ladder):
    """Return the accuracy that the BatchNorm step started from."""
    index = [rung.step for rung in ladder.rungs].index("batchnorm")
    return [rung.accuracy for rung in ladder.rungs[:index] if rung.kept][-1]


def test_the_same_ladder_is_climbed_once(trained, pictures, tmp_path):
    first = adaptation.adapted(build(tmp_path, pictures, Reduced(trained).eval()), REDUCED)
    told = []

    second = adaptation.adapted(build(tmp_path, pictures, Reduced(trained).eval(), told=told), REDUCED)
    twin = dataclasses.replace(first[0], precision="fp32")

    assert second == first
    assert told == []
    assert adaptation.adapted(build(tmp_path, pictures, Reduced(trained).eval()), twin) == (twin, first[1])


def test_without_labels_the_native_models_decisions_judge(trained, pictures, tmp_path):
    _, ladder = adaptation.adapted(build(tmp_path, pictures, Reduced(trained).eval()), REDUCED)

    assert (ladder.metric, ladder.native_accuracy) == ("agreement", None)
    assert all(rung.accuracy is None for rung in ladder.rungs)
    assert "batchnorm" in ladder.kept


def test_a_fine_tuning_sees_what_the_native_model_sees(trained, pictures, tmp_path, monkeypatch):
    """A smaller crop makes up for weights that were not trained, and cuts away what the native model decides by."""
    this, seen = build(tmp_path, pictures, Reduced(trained)), []

    class Step:
        Options = distill.Options
        unsupported = staticmethod(lambda subject, options: None)
        apply = staticmethod(lambda subject, options: seen.append(subject.preprocessing))

    monkeypatch.setattr(adapt, "find", lambda name: Step)
    plain = dataclasses.replace(REDUCED, precision="fp32")
    ladder = adaptation._Ladder(this=this, plain=plain, split=splits.split_images(this))
    start = ladder.start()
    zoomed = dataclasses.replace(plain, preprocessing=dataclasses.replace(PLAIN, crop_pct=0.7))

    ladder.climb("distill", dataclasses.replace(start, variant=zoomed))

    assert seen == [PLAIN]


@pytest.mark.parametrize(("variant", "request_"), [(Variant(resolution=(16, 16)), {}), (REDUCED, {"adapt": "none"})])
def test_the_native_resolution_is_left_alone_and_so_is_what_was_not_asked_for(
    variant, request_, trained, pictures, tmp_path
):
    this = build(tmp_path, pictures, trained, **request_)

    assert adaptation.adapted(this, variant) == (variant, None)
    assert not list(tmp_path.iterdir())


def test_few_images_change_nothing_and_say_so(trained, pictures, tmp_path):
    few = pictures.subset(range(40))

    variant, ladder = adaptation.adapted(build(tmp_path, few, trained), REDUCED)

    assert variant == REDUCED
    assert (ladder.rungs, ladder.reason) == ((), "40 images, 128 are the fewest to choose by and to judge on")


def test_an_onnx_file_has_its_preprocessing_searched_and_keeps_its_weights(pictures, tmp_path):
    pooled = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, 1, 1),
        torch.nn.ReLU(),
        torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(),
        torch.nn.Linear(8, 4),
    )
    torch_side = build(tmp_path / "torch", pictures, pooled.eval())
    native = export.exported(torch_side.steps, torch_side.model, Variant(resolution=(16, 16)), pictures).onnx
    this = build(tmp_path / "onnx", pictures, None)
    this = dataclasses.replace(this, model=LazyModel(SPEC, Path(native.path), lambda: None))

    variant, ladder = adaptation.adapted(this, REDUCED)

    assert variant.weights == ""
    assert "batchnorm: an ONNX file's BatchNorm is folded into its weights" in ladder.reason
    assert ladder.rungs[0].step == "plain"


@pytest.mark.parametrize(
    ("macs", "judging", "reason"),
    [
        (10_000_000, 600, ""),
        (9_000_000_000, 277, ""),
        (60_000_000_000, 128, "60 GMACs an image are too many"),
    ],
)
def test_the_work_is_limited_unless_all_of_it_is_asked_for(macs, judging, reason, tmp_path):
    pixels = np.zeros((1200, 2, 2, 3), np.uint8)
    np.save(tmp_path / "images.npy", pixels)
    every = images.collect(tmp_path / "images.npy")
    split = splits.Split(choosing=every.subset(range(600)), judging=every.subset(range(600, 1200)))

    found, told = adaptation.afforded(split, macs)

    assert len(found.judging) == judging
    assert told.startswith(reason)
    assert bool(told) == bool(reason)
