"""The fakes have what was recorded of a version, and nothing more (decision 0009)."""

import pytest

from rdeploy.backends import _trt


def opened(flavour):
    runtime = flavour.trt.Runtime(_trt.logger_of(flavour))
    return runtime.deserialize_cuda_engine(b"plan")


@pytest.mark.parametrize("version", ["8.5", "10.3", "11.4"])
def test_what_only_rtx_has_is_hidden_from_the_others(fake, version):
    flavour, _ = fake(version)
    engine = opened(flavour)

    with pytest.raises(AttributeError, match="this version's IExecutionContext has no is_stream_capturable"):
        _ = engine.create_execution_context().is_stream_capturable
    assert opened(fake("rtx")[0]).create_execution_context().is_stream_capturable(0)


@pytest.mark.parametrize(
    ("version", "name"), [("8.5", "create_runtime_config"), ("10.3", "create_runtime_config"), ("11.4", "num_bindings")]
)
def test_an_engine_has_only_what_its_version_has(fake, version, name):
    with pytest.raises(AttributeError, match=f"this version's ICudaEngine has no {name}"):
        getattr(opened(fake(version)[0]), name)


def test_nothing_can_be_set_that_was_not_recorded(fake):
    flavour, _ = fake("10.3")

    with pytest.raises(AttributeError, match="IExecutionContext has no profilers"):
        opened(flavour).create_execution_context().profilers = None
    with pytest.raises(AttributeError, match="OnnxParser has no parse_file"):
        _ = flavour.trt.OnnxParser(None, None).parse_file
