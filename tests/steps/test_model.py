"""A model whose module is loaded when it is needed."""

import pytest

from rdeploy.models import Loaded
from rdeploy.steps.model import LazyModel, fill
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


def test_a_network_forgets_what_it_computed_of_its_old_weights():
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    levit = pytest.importorskip("timm.models.levit", reason="timm is not installed")
    net = torch.nn.Sequential(levit.Attention(8, key_dim=4, num_heads=2, resolution=(2, 2))).eval()
    tokens, state = torch.randn(1, 4, 8), {name: tensor + 1 for name, tensor in net.state_dict().items()}
    with torch.no_grad():
        before = net(tokens)
        fresh = torch.nn.Sequential(levit.Attention(8, key_dim=4, num_heads=2, resolution=(2, 2))).eval()
        fresh.load_state_dict(state)

        fill(net, state)

        assert not torch.equal(net(tokens), before)
        torch.testing.assert_close(net(tokens), fresh(tokens))
