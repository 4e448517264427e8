"""A model whose module is loaded when it is needed."""

import pytest

from rdeploy.models import Loaded
from rdeploy.steps.model import LazyModel
from rdeploy.types import ModelSpec, Preprocessing

SPEC = ModelSpec(
    name="net",
    source="net",
    sha256="",
    native_resolution=(2, 2),
    preprocessing=Preprocessing(mean=(0.5,) * 3, std=(0.5,) * 3),
)


def test_how_many_numbers_it_answers_with():
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    module = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 7)).eval()

    assert LazyModel(SPEC, None, lambda: Loaded(spec=SPEC, module=module)).answers() == 7
