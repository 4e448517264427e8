"""The module itself as an engine: exported, opened as plain data, run; and what it refuses."""

import zipfile

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs PyTorch: pip install 'rdeploy[torch]'")

from rdeploy import backends, export  # noqa: E402
from rdeploy.errors import ConfigError, InvariantError, Unsupported  # noqa: E402
from rdeploy.types import ModelSpec, Preprocessing, Target  # noqa: E402

SPEC = ModelSpec(
    name="tiny", source="tiny", sha256="", native_resolution=(4, 4), preprocessing=Preprocessing(mean=(0.0,), std=(1.0,))
)  # fmt: skip


class Net(torch.nn.Module):
    """The mean of every channel, times two."""

    def forward(self, x):
        return x.mean((2, 3)) * 2.0


def program(folder, *, dynamic=False):
    (folder / "model.onnx").write_bytes(b"graph")
    export.save_program(Net().eval(), SPEC, (4, 4), folder / "model.pt2", dynamic_batch=dynamic)
    return folder / "model.onnx"


def build(folder, name="torch", **how):
    plugin = backends.find(name)
    target = Target(name="t", batch_sizes=(2,) if how.get("dynamic") else (1,))
    return plugin.build_engine(program(folder, **how), folder / "engine", target=target, options=plugin.Options())


def images(count=1):
    return np.arange(count * 48, dtype=np.float32).reshape(count, 3, 4, 4)


def test_the_program_gives_what_the_module_gives(tmp_path):
    engine = build(tmp_path)

    assert (engine.path, engine.backend, engine.backend_version) == (
        "torch.pt2",
        "torch",
        torch.__version__.split("+")[0],
    )
    with backends.find("torch").open_session(tmp_path / "engine" / engine.path, threads=1) as session:
        assert [(i.dtype, i.shape) for i in session.inputs] == [("float32", (1, 3, 4, 4))]
        assert [(o.dtype, o.shape) for o in session.outputs] == [("float32", (1, 3))]
        made = session.run({session.inputs[0].name: images()})[session.outputs[0].name]
        np.testing.assert_array_equal(made, images().mean((2, 3)) * 2)
        with pytest.raises(ConfigError, match="the engine takes"):
            session.run({"nothing": images()})


def test_a_dynamic_batch_stays_dynamic(tmp_path):
    engine = build(tmp_path, dynamic=True)

    with backends.find("torch").open_session(tmp_path / "engine" / engine.path) as session:
        assert session.inputs[0].shape == (-1, 3, 4, 4)
        for count in (1, 3):
            made = session.run({session.inputs[0].name: images(count)})[session.outputs[0].name]
            np.testing.assert_array_equal(made, images(count).mean((2, 3)) * 2)


def test_torch_compile_gets_the_same_program(monkeypatch, tmp_path):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda module: compiled.append(module) or module)
    engine = build(tmp_path, "torch_compile")

    with backends.find("torch_compile").open_session(tmp_path / "engine" / engine.path) as session:
        made = session.run({session.inputs[0].name: images()})[session.outputs[0].name]

    np.testing.assert_array_equal(made, images().mean((2, 3)) * 2)
    assert (engine.path, engine.backend) == ("torch_compile.pt2", "torch_compile")
    assert len(compiled) == 1


def test_the_profilers_operators_are_part_of_the_whole(tmp_path):
    path = tmp_path / "engine" / build(tmp_path).path

    with backends.find("torch").open_session(path) as session:
        name = session.inputs[0].name
    found = backends.find("torch").layer_times(path, {name: images()}, runs=3)

    assert "aten::mean" in [kernel.name for kernel in found.kernels]
    assert found.runs == 3
    assert sum(kernel.mean_ms for kernel in found.kernels) + found.remainder_ms == pytest.approx(found.whole_ms)


def test_a_graph_without_its_module_is_unsupported(tmp_path):
    (tmp_path / "int8.onnx").write_bytes(b"graph")
    plugin = backends.find("torch")

    with pytest.raises(Unsupported, match="PyTorch runs the FP32 module itself, and there is none to int8.onnx"):
        plugin.build_engine(tmp_path / "int8.onnx", tmp_path / "e", target=Target(name="t"), options=plugin.Options())


@pytest.mark.parametrize("damage", ["cut", "garbage", "absent"])
def test_a_damaged_program_is_refused_in_one_line(tmp_path, damage):
    path = tmp_path / "engine" / build(tmp_path).path
    content = path.read_bytes()
    path.unlink()
    if damage != "absent":
        path.write_bytes(content[: len(content) // 2] if damage == "cut" else b"garbage" * 100)

    with pytest.raises(ConfigError) as caught, backends.find("torch").open_session(path):
        pass

    assert "torch.pt2" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_program_that_could_run_code_is_not_opened(tmp_path):
    path = tmp_path / "engine" / build(tmp_path).path
    with zipfile.ZipFile(path, "a") as archive:
        root = archive.namelist()[0].partition("/")[0]
        archive.writestr(f"{root}/data/aotinductor/evil.so", b"code")

    with pytest.raises(ConfigError, match="compiled code"), backends.find("torch").open_session(path):
        pass


def test_a_session_that_is_not_open_does_not_run(tmp_path):
    with pytest.raises(InvariantError, match="not open"):
        backends.find("torch").open_session(tmp_path / "x.pt2").run({})
