"""Bundles on another machine: an engine that does not fit is built again from the bundle's graph, or refused in words."""

import dataclasses
import json

import numpy as np
import pytest

from rdeploy import backends, bundle, hardware, preflight, profiling, rebuild, runtime
from rdeploy.backends import tensorrt
from rdeploy.errors import ConfigError, MissingDependency, StageError
from rdeploy.results import EngineResult, Float16
from rdeploy.types import OnnxModel, TensorInfo, Variant

INPUT = TensorInfo(name="x", dtype="float32", shape=(-1, 3, 6, 6))


class Session:
    """Answers with the mean of each channel, and knows which file it was opened from."""

    inputs, outputs = (INPUT,), (TensorInfo(name="y", dtype="float32", shape=(-1, 3)),)
    opened: list = []

    def __init__(self, path):
        self.path = path

    def __enter__(self):
        Session.opened.append(self.path.read_bytes())
        return self

    def __exit__(self, *error):
        pass

    def run(self, inputs):
        return {"y": inputs["x"].mean((2, 3))}


@pytest.fixture
def device(monkeypatch, tmp_path):
    """A machine with TensorRT 11.4 and an H100; `builds` are the builds made there, `fails` makes them fail, `obstacles`
    is what the pre-flight finds."""
    builds = []
    Session.opened = []
    state = {"builds": builds, "fails": None, "obstacles": ()}

    def build_engine(onnx, directory, *, target, options):
        if state["fails"] is not None:
            raise state["fails"]
        record = backends._engine.BuildRecord(onnx, directory)
        builds.append((onnx.read_bytes(), target.batch_sizes, options))
        path = directory / "tensorrt.engine"
        path.write_bytes(b"for sm_90")
        return record.engine(path, backend="tensorrt", version="11.4", built_for=("sm_90",))

    monkeypatch.setenv("RDEPLOY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hardware, "gpus", lambda: (hardware.Gpu("NVIDIA H100", "sm_90", 80 << 30),))
    for name, value in (
        ("version", lambda: "11.4"), ("unavailable", lambda: None), ("build_engine", build_engine),
        ("open_session", lambda path, threads=None: Session(path)),
    ):  # fmt: skip
        monkeypatch.setattr(tensorrt, name, value)
    monkeypatch.setattr(backends._engine, "missing", lambda *names: None)
    monkeypatch.setattr(preflight, "obstacles", lambda *asked: state["obstacles"])
    return state


def make_bundle(tmp_path, result, *, engine, options=(), **facts):
    """Write a bundle for sm_86 / TensorRT 10.3, with or without its engine."""
    source = tmp_path / "built"
    source.mkdir(exist_ok=True)
    (source / "model.onnx").write_bytes(b"portable graph")
    (source / "tensorrt.engine").write_bytes(b"for sm_86")
    graph = OnnxModel(
        path=str(source / "model.onnx"), sha256=backends.engine_sha256(source / "model.onnx"), precision="fp32", opset=17,
        inputs=(INPUT,), outputs=(),
    )  # fmt: skip
    built = dataclasses.replace(
        result.variants[0].engines[0].engine, backend="tensorrt", path="tensorrt.engine", backend_version="10.3",
        sha256=backends.engine_sha256(source / "tensorrt.engine"), size_bytes=9, built_for=("sm_86",),
    )  # fmt: skip
    engines = (EngineResult(backend="tensorrt", engine=built),) if engine else ()
    target = dataclasses.replace(
        result.target, batch_sizes=(1, 8), backend_options=(("tensorrt", tuple(options)),) if options else ()
    )
    facts = {"variant": Variant(resolution=(6, 6)), "quantization": None, **facts}
    row = dataclasses.replace(result.variants[0], engines=engines, **facts)
    return bundle.write(
        tmp_path / "net-r6-fp32", result=dataclasses.replace(result, target=target), row=row,
        onnx=source / "model.onnx", engines={"tensorrt.engine": source}, graphs={"tensorrt": graph},
    )  # fmt: skip


PIXELS = np.zeros((1, 6, 6, 3), np.uint8)


def test_an_engine_for_another_gpu_and_version_is_built_again_once(device, tmp_path, result):
    folder = make_bundle(tmp_path, result, engine=True, options=[("profile_per_batch", True)])

    for _ in range(2):
        with (
            pytest.warns(
                UserWarning,
                match=r"using tensorrt \(built again on this machine, since: built for sm_86 / TensorRT 10.3, "
                r"this is sm_90 / 11.4",
            ),
            runtime.load(folder) as model,
        ):
            assert model(PIXELS).shape == (1, 3)

    ((graph, sizes, options),) = device["builds"]
    assert (graph, sizes) == (b"portable graph", (1, 8))
    assert options == tensorrt.Options(profile_per_batch=True)
    assert Session.opened == [b"for sm_90"] * 2


def test_an_engine_that_was_left_to_the_device_is_built_there(device, tmp_path, result):
    folder = make_bundle(tmp_path, result, engine=False)

    with pytest.warns(UserWarning, match="since: not built yet"), runtime.load(folder):
        pass

    assert len(device["builds"]) == 1


def test_where_the_builder_is_missing_the_bundle_is_refused_in_words(device, monkeypatch, tmp_path, result):
    folder = make_bundle(tmp_path, result, engine=True)
    monkeypatch.setattr(tensorrt, "unavailable", lambda: "TensorRT has no builder here")

    with pytest.raises(MissingDependency) as caught:
        runtime.load(folder)

    assert "tensorrt: built for sm_86 / TensorRT 10.3, this is sm_90 / 11.4" in str(caught.value)
    assert "(TensorRT has no builder here)" in str(caught.value)


def test_a_missing_package_is_told_and_nothing_is_built(device, monkeypatch, tmp_path, result):
    monkeypatch.setattr(backends._engine, "missing", lambda *names: "cuda-python is not installed here")
    monkeypatch.setattr(tensorrt, "version", lambda: "10.3")
    gpu = hardware.Gpu("NVIDIA A10", "sm_86", 24 << 30)
    monkeypatch.setattr(hardware, "gpus", lambda: (gpu,))
    fits = make_bundle(tmp_path, result, engine=True)

    with pytest.raises(MissingDependency, match=r"\(tensorrt: cuda-python is not installed here\)"):
        runtime.load(fits)

    assert device["builds"] == []


@pytest.mark.parametrize(("engine", "reason"), [(True, "built for sm_86 / TensorRT 10.3.*"), (False, "not built yet")])
def test_what_could_not_be_opened_is_not_built(device, monkeypatch, tmp_path, result, engine, reason):
    monkeypatch.setattr(backends._engine, "missing", lambda *names: "cuda-python is not installed here")
    folder = make_bundle(tmp_path, result, engine=engine)

    with pytest.raises(MissingDependency, match=rf"tensorrt: {reason} \(cuda-python is not installed here\)"):
        runtime.load(folder)

    assert device["builds"] == []


def test_a_builder_that_refuses_is_told(device, tmp_path, result):
    folder = make_bundle(tmp_path, result, engine=True)
    device["fails"] = StageError("build", "TensorRT cannot build model.onnx: no kernel")

    with pytest.raises(MissingDependency, match="cannot build model.onnx: no kernel"):
        runtime.load(folder)


def test_a_changed_graph_is_refused_and_not_built(device, tmp_path, result):
    folder = make_bundle(tmp_path, result, engine=True)
    (folder / "model.onnx").write_bytes(b"malicious graph")

    with pytest.raises(ConfigError, match=r"model.onnx was truncated or changed, it is not what was built"):
        runtime.load(folder)
    assert device["builds"] == []


def test_what_cannot_be_built_here_is_told_before_it_is_tried(device, tmp_path, result):
    folder = make_bundle(tmp_path, result, engine=True)
    device["obstacles"] = ("TensorRT 11.4 has no Unique (u)", "another reason")

    with pytest.raises(MissingDependency, match=r"TensorRT 11.4 has no Unique \(u\); another reason"):
        runtime.load(folder)

    assert device["builds"] == []


def test_an_engine_in_the_cache_that_was_changed_is_refused(device, tmp_path, result):
    folder = make_bundle(tmp_path, result, engine=True)
    with pytest.warns(UserWarning, match="built again"), runtime.load(folder):
        pass
    (place,) = (tmp_path / "cache" / "rebuilt").iterdir()
    (place / "tensorrt.engine").write_bytes(b"malicious")

    with pytest.raises(MissingDependency, match="the engine that was built here was changed since; delete that folder"):
        runtime.load(folder)


def test_profile_measures_what_it_builds_again(device, monkeypatch, tmp_path, result):
    folder = make_bundle(tmp_path, result, engine=False)

    (place,) = [one.place for one in profiling._of_bundle(folder, [])]

    assert place.read_bytes() == b"for sm_90"


def test_without_a_gpu_nothing_is_built(monkeypatch, tmp_path, result):
    monkeypatch.setattr(hardware, "gpus", lambda: ())
    manifest = {"graphs": [{"backend": "tensorrt"}], "engines": []}

    assert rebuild.why_not(manifest, "tensorrt") == "there is no NVIDIA GPU here"
    assert rebuild.why_not(manifest, "tensorrt_rtx") == "the bundle does not hold its portable graph"
    assert rebuild.why_not(manifest, "openvino") == "openvino engines are not built again"
    assert runtime.to_be_built(manifest, ()) == []
    assert runtime.to_be_built(manifest, ["tensorrt"]) == [{"backend": "tensorrt"}]


def test_the_manifest_says_how_to_build_and_what_each_graph_is(tmp_path, result):
    folder = make_bundle(tmp_path, result, engine=False, options=[("batch_ranges", ((1, 1, 8),))])

    manifest = bundle.read(folder)

    assert manifest["build"] == {"batch_sizes": [1, 8], "backend_options": {"tensorrt": {"batch_ranges": [[1, 1, 8]]}}}
    assert [(graph["backend"], graph["path"]) for graph in manifest["graphs"]] == [("tensorrt", "model.onnx")]
    assert rebuild._target(manifest).options_of("tensorrt") == (("batch_ranges", ((1, 1, 8),)),)
    assert "--maxShapes=x:8x3x6x6" in (folder / "build-engine.sh").read_text()


@pytest.mark.parametrize(
    ("fp16", "flags"),
    [(None, "--int8"), (Float16(layers=3, kept=(), casts=2, weights=9, denormals=0), "--int8 --fp16")],
)
def test_the_script_allows_what_the_graph_is_written_in(tmp_path, result, fp16, flags):
    folder = make_bundle(
        tmp_path, result, engine=False, variant=Variant(resolution=(6, 6), precision="int8"), fp16=fp16
    )

    assert f"  85??) set -- {flags} --useCudaGraph" in (folder / "build-engine.sh").read_text()


def test_every_file_of_a_bundle_has_its_sum(tmp_path, result):
    folder = make_bundle(tmp_path, result, engine=True)

    lines = (folder / "SHA256SUMS").read_text().splitlines()

    known = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    files = [file for file in folder.rglob("*") if file.is_file() and file.name != "SHA256SUMS"]
    assert set(known) == {file.relative_to(folder).as_posix() for file in files}
    assert all(backends.engine_sha256(folder / name) == digest for name, digest in known.items())


def test_a_manifest_that_was_changed_is_refused(tmp_path, result):
    folder = make_bundle(tmp_path, result, engine=True)
    content = json.loads((folder / "manifest.json").read_text())
    content["engines"][0]["notes"] = ["hello"]
    (folder / "manifest.json").write_text(json.dumps(content))

    with pytest.raises(ConfigError, match=r"manifest.json: was truncated or changed, it is not what was built"):
        bundle.read(folder)
