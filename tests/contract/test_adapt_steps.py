"""What every step of the ladder must do; a new file in rdeploy/adapt/ is picked up by itself."""

import copy
import dataclasses

import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

from rdeploy import adapt, plugins  # noqa: E402

from ..adapt.conftest import PLAIN, Views, blobs, network, subject  # noqa: E402

STEPS = plugins.names("rdeploy.adapt")


@pytest.fixture(params=STEPS)
def step(request):
    return adapt.find(request.param)


def small(step):
    """Return the step's options, short where it trains."""
    fields = {field.name for field in dataclasses.fields(step.Options)}
    return step.Options(epochs=1) if "epochs" in fields else step.Options()


@pytest.fixture
def one(tmp_path):
    native = network().eval()
    return subject(network().eval(), native, training=Views(blobs(160, seed=2)[0]), folder=tmp_path)


def test_the_ladder_has_every_step_there_is():
    assert sorted(adapt.STEPS) == list(STEPS)


def test_it_defines_what_the_protocol_lists(step):
    assert callable(step.unsupported)
    assert callable(step.apply)
    assert dataclasses.is_dataclass(step.Options)
    assert step.Options.__dataclass_params__.frozen
    assert step.Options() == step.Options()
    assert step.__doc__


def test_it_proposes_one_kind_of_change_or_none_and_leaves_both_networks_alone(step, one):
    before = [copy.deepcopy(module.state_dict()) for module in (one.module, one.native)]
    assert step.unsupported(one, small(step)) is None

    change = step.apply(one, small(step))

    for module, state in zip((one.module, one.native), before):
        assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())
        assert not module.training
    if change is not None:
        assert change.detail
        assert (change.preprocessing is None) != (change.state is None)
        assert change.preprocessing != PLAIN
        if change.state is not None:
            one.module.load_state_dict(change.state)


def test_the_same_seed_proposes_the_same(step, one, tmp_path):
    first = step.apply(dataclasses.replace(one, folder=tmp_path / "first"), small(step))
    second = step.apply(dataclasses.replace(one, folder=tmp_path / "second"), small(step))

    assert (first is None) == (second is None)
    if first is not None and first.state is not None:
        assert all(torch.equal(value, second.state[name]) for name, value in first.state.items())
    elif first is not None:
        assert first == second


def test_an_onnx_file_is_taken_or_refused_in_plain_words(step, one):
    file = dataclasses.replace(one, module=None, native=None)

    reason = step.unsupported(file, small(step))

    if reason is None:
        step.apply(file, small(step))
    else:
        assert "ONNX file" in reason
        assert "\n" not in reason
