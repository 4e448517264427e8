"""Dense outputs at the native size: the Resize in the graph against PyTorch's interpolation."""

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import nn

from rdeploy import export
from rdeploy.errors import Unsupported
from rdeploy.models.answers import Take
from rdeploy.quantize.ranges import activations
from rdeploy.types import ModelSpec, Preprocessing

SPEC = ModelSpec(
    name="dense",
    source="test",
    sha256="0" * 64,
    native_resolution=(16, 24),
    preprocessing=Preprocessing(mean=(0.0,) * 3, std=(1.0,) * 3),
    task="segmentation",
)


class Dense(nn.Module):
    """Scores at half the size of the input, or enlarged to it, and a vector beside them."""

    def __init__(self, *, enlarge, align_corners=False):
        super().__init__()
        self.conv, self.enlarge, self.align_corners = nn.Conv2d(3, 4, 3, 2, 1), enlarge, align_corners

    def forward(self, images):
        scores = self.conv(images)
        if self.enlarge:
            size = images.shape[-2:]
            scores = nn.functional.interpolate(scores, size=size, mode="bilinear", align_corners=self.align_corners)
        return scores, images.mean(dim=(2, 3))


def exported(module, tmp_path, *, dynamic_batch=False):
    native = export.export(module, SPEC, (16, 24), tmp_path / "native.onnx", dynamic_batch=dynamic_batch)
    export.export(module, SPEC, (12, 18), tmp_path / "small.onnx", dynamic_batch=dynamic_batch)
    changed = export.restore_size(tmp_path / "small.onnx", native)
    return export.describe(tmp_path / "small.onnx", precision="fp32"), changed


@pytest.mark.parametrize("dynamic_batch", [False, True])
def test_a_resize_at_the_end_goes_to_the_native_size_at_once(tmp_path, dynamic_batch):
    torch.manual_seed(0)
    module = Dense(enlarge=True).eval()
    small, changed = exported(module, tmp_path, dynamic_batch=dynamic_batch)
    image = np.random.default_rng(0).standard_normal((1, 3, 12, 18)).astype(np.float32)

    name = small.outputs[0].name
    found = next(activations(tmp_path / "small.onnx", [name], [image]))[name]

    with torch.no_grad():
        scores = module.conv(torch.from_numpy(image))
        exact = nn.functional.interpolate(scores, size=(16, 24), mode="bilinear").numpy()
    assert changed == ("output",)
    assert small.outputs[0].shape == (-1 if dynamic_batch else 1, 4, 16, 24)
    assert small.outputs[1].shape[1:] == (3,)
    assert [node.op_type for node in ir.load(tmp_path / "small.onnx").graph].count("Resize") == 1
    np.testing.assert_allclose(found, exact, atol=1e-5)


@pytest.mark.parametrize(("enlarge", "align_corners", "resizes"), [(False, False, 1), (True, True, 2)])
def test_other_outputs_get_a_resize_of_their_own(tmp_path, enlarge, align_corners, resizes):
    torch.manual_seed(0)
    module = Dense(enlarge=enlarge, align_corners=align_corners).eval()
    small, _ = exported(module, tmp_path)
    size = small.outputs[0].shape[2:]
    image = np.random.default_rng(0).standard_normal((1, 3, 12, 18)).astype(np.float32)

    found = next(activations(tmp_path / "small.onnx", ["output"], [image]))["output"]

    with torch.no_grad():
        exact = nn.functional.interpolate(module(torch.from_numpy(image))[0], size=size, mode="bilinear").numpy()
    assert size == ((16, 24) if enlarge else (8, 12))
    assert [node.op_type for node in ir.load(tmp_path / "small.onnx").graph].count("Resize") == resizes
    np.testing.assert_allclose(found, exact, atol=1e-5)


def test_outputs_that_have_their_size_are_left_alone(tmp_path):
    native = export.export(Dense(enlarge=True).eval(), SPEC, (16, 24), tmp_path / "native.onnx")
    before = (tmp_path / "native.onnx").read_bytes()

    assert export.restore_size(tmp_path / "native.onnx", native) == ()
    assert (tmp_path / "native.onnx").read_bytes() == before


class Boxes(nn.Module):
    """One candidate a pixel of the feature map: its centre and size in pixels, and two scores."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, 4, 1)

    def forward(self, images):
        return self.conv(images).flatten(2)


def test_boxes_come_back_in_pixels_of_the_native_size(tmp_path):
    torch.manual_seed(0)
    module = Boxes().eval()
    export.export(module, SPEC, (12, 18), tmp_path / "small.onnx")
    image = np.random.default_rng(0).standard_normal((1, 3, 12, 18)).astype(np.float32)

    export.restore_boxes(tmp_path / "small.onnx", (16, 24), (12, 18))
    found = next(activations(tmp_path / "small.onnx", ["output"], [image]))["output"]

    with torch.no_grad():
        exact = module(torch.from_numpy(image)).numpy()
    factors = np.array([4 / 3, 4 / 3, 4 / 3, 4 / 3, 1, 1]).reshape(1, 6, 1)
    np.testing.assert_allclose(found, exact * factors, rtol=1e-5, atol=1e-6)


def test_boxes_that_count_the_cells_of_a_map_are_refused_behind_a_place_inside(tmp_path):
    export.export(Boxes().eval(), SPEC, (16, 24), tmp_path / "small.onnx")

    with pytest.raises(Unsupported, match="boxes in pixels count the cells of its maps, and stem changes these"):
        export.restore_boxes(tmp_path / "small.onnx", (16, 24), (16, 24), inside=["stem"])


class Queries(Boxes):
    """DETR's form: relative boxes."""

    def forward(self, images):
        found = super().forward(images)
        return {
            "softmax_logits": found.transpose(1, 2)[:, :, :3],
            "pred_boxes": found.transpose(1, 2)[:, :, :4].sigmoid(),
        }


def test_relative_boxes_stay_behind_any_place(tmp_path):
    module, names = Queries().eval(), ("softmax_logits", "pred_boxes")
    export.export(Take(module, names), SPEC, (16, 24), tmp_path / "small.onnx")
    before = (tmp_path / "small.onnx").read_bytes()

    export.restore_boxes(tmp_path / "small.onnx", (16, 24), (16, 24), inside=["stem"])

    assert (tmp_path / "small.onnx").read_bytes() == before
