"""Preprocessing in front of a program of PyTorch: what the network sees is what Python would give it."""

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs PyTorch: pip install 'rdeploy[torch]'")

from rdeploy import backends, export  # noqa: E402
from rdeploy.data import preprocess  # noqa: E402
from rdeploy.types import ModelSpec, Preprocessing  # noqa: E402

SPEC = ModelSpec(
    name="net", source="net", sha256="", native_resolution=(40, 61),
    preprocessing=Preprocessing(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), interpolation="bicubic", crop_pct=1.0),
)  # fmt: skip


class Seen(torch.nn.Module):
    """Returns what it was given."""

    def forward(self, x):
        return x * 1.0


@pytest.mark.parametrize(("size", "dynamic"), [((30, 46), False), ((40, 46), True), ((40, 61), False)])
def test_the_program_sees_what_python_would_give_it(size, dynamic, tmp_path):
    export.save_program(Seen().eval(), SPEC, size, tmp_path / "model.pt2", dynamic_batch=dynamic)
    count = 3 if dynamic else 1
    pictures = np.random.default_rng(0).integers(0, 256, (count, 40, 61, 3), dtype=np.uint8)

    export.embed_program(tmp_path / "model.pt2", SPEC, size, tmp_path / "embedded.pt2", dynamic_batch=dynamic)

    with backends.find("torch").open_session(tmp_path / "embedded.pt2") as session:
        (info,) = session.inputs
        assert (info.dtype, info.shape) == ("uint8", (-1 if dynamic else 1, 40, 61, 3))
        found = session.run({info.name: pictures})[session.outputs[0].name]
    std, mean = (np.reshape(numbers, (3, 1, 1)) for numbers in (SPEC.preprocessing.std, SPEC.preprocessing.mean))
    for one, picture in zip(found, pictures):
        exact = preprocess.cut(picture, (0.0, 0.0, 40.0, 61.0), size, SPEC.preprocessing, channels=3).transpose(2, 0, 1)
        assert np.abs((one * std + mean) * 255 - exact).max() < 1.01
