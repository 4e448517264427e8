"""What docs/consumers.md shows: the plain program gives what rdeploy gives, and C++ makes the same input, bit for bit."""

import importlib.util
import io
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import rdeploy
from rdeploy.data import preprocess
from rdeploy.types import Preprocessing

ROOT = Path(__file__).resolve().parents[2]
CPP = ROOT / "examples" / "cpp"
SIZES = [(40, 60), (61, 37), (33, 33), (9, 20)]


def photo(size, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def plain():
    pytest.importorskip("onnxruntime", reason="pip install 'rdeploy[cpu]'")
    spec = importlib.util.spec_from_file_location("plain_onnxruntime", ROOT / "examples" / "plain_onnxruntime.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("size", SIZES)
def test_the_plain_program_gives_what_rdeploy_gives(plain, tiny_bundle, size):
    image = photo(size)

    with rdeploy.load(tiny_bundle) as model:
        wanted = model(image)

    np.testing.assert_array_equal(plain.run(tiny_bundle, image), wanted)


@pytest.mark.parametrize(
    ("resolution", "crop_pct", "interpolation", "antialias"),
    [((24, 24), 0.875, "bicubic", True), ((16, 20), 0.9, "bilinear", True), ((24, 24), 0.95, "bilinear", False)],
)
@pytest.mark.parametrize("size", SIZES)
def test_the_plain_programs_pixels_are_rdeploys(plain, size, resolution, crop_pct, interpolation, antialias):
    how = {
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
        "interpolation": interpolation,
        "crop_pct": crop_pct,
        "antialias": antialias,
    }
    manifest = {"model": {"preprocessing": how}, "variant": {"resolution": list(resolution)}}
    image = photo(size)

    made = plain.normalised(plain.pixels(image, manifest), manifest)

    np.testing.assert_array_equal(made, expected(image, resolution, how))


def expected(image, resolution, how):
    known = Preprocessing(**{**how, "mean": tuple(how["mean"]), "std": tuple(how["std"])})
    return preprocess.normalise(preprocess.to_pixels(image, resolution, known)[None], known)


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("there is no C++ compiler here")
    path = tmp_path_factory.mktemp("cpp") / "preprocess"
    subprocess.run(
        [compiler, "-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", CPP / "preprocess.cpp", "-o", path], check=True
    )
    return path


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "lanczos", "box", "hamming", "sharp"])
@pytest.mark.parametrize(
    ("size", "resolution"), [(SIZES[0], (24, 24)), (SIZES[1], (16, 20)), (SIZES[2], (28, 28)), (SIZES[3], (64, 64))]
)
def test_cpp_makes_the_same_input_bit_for_bit(program, size, resolution, interpolation):
    sharp = interpolation == "sharp"
    how = {
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
        "interpolation": "bilinear" if sharp else interpolation,
        "crop_pct": 0.875,
        "antialias": not sharp,
    }
    image = photo(size, seed=3)
    stream = io.BytesIO()
    image.save(stream, "PPM")
    words = [*resolution, how["interpolation"], 0.875, *how["mean"], *how["std"], *(["sharp"] if sharp else [])]

    done = subprocess.run([program, *map(str, words)], input=stream.getvalue(), capture_output=True, check=True)

    made = np.frombuffer(done.stdout, np.float32).reshape(1, 3, *resolution)
    np.testing.assert_array_equal(made, expected(image, resolution, how))


def test_cpp_says_how_it_is_called(program):
    done = subprocess.run([program], capture_output=True, text=True, check=False)

    assert (done.returncode, done.stderr.startswith("usage: preprocess HEIGHT WIDTH")) == (2, True)


@pytest.fixture(scope="module")
def runner(tmp_path_factory):
    """The TensorRT program, compiled against stand-ins of TensorRT's and CUDA's headers that compute on the CPU."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("there is no C++ compiler here")
    folder = tmp_path_factory.mktemp("tensorrt")
    headers = Path(__file__).parent / "stand_ins"
    strict = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-isystem", headers]
    subprocess.run([compiler, *strict, CPP / "tensorrt.cpp", "-o", folder / "run-tensorrt"], check=True)
    (folder / "plan").write_bytes(b"plan")
    (folder / "bytes").write_bytes(b"bytes")
    (folder / "other").write_bytes(b"for another GPU")

    def run(engine, given):
        return subprocess.run([folder / "run-tensorrt", folder / engine], input=given, capture_output=True, check=False)

    return run


@pytest.mark.parametrize(
    ("engine", "given", "printed"),
    [
        ("plan", np.float32([1, 2.5, -3]).tobytes() + b"more", "double 2\ndouble 5\ndouble -6\nsum 0.5\n"),
        ("bytes", bytes([1, 2, 200]), "double 2\ndouble 4\ndouble 400\nsum 203\n"),
    ],
)
def test_the_cpp_program_runs_an_engine_by_its_tensors_names(runner, engine, given, printed):
    done = runner(engine, given)

    assert (done.returncode, done.stdout.decode()) == (0, printed)


@pytest.mark.parametrize(
    ("engine", "given", "reason"),
    [
        ("absent", b"", "the engine cannot be read"),
        ("other", b"", "Serialization failed\nbuilt for another GPU or another TensorRT: run build-engine.sh here"),
        ("plan", b"short", "the input is shorter than the engine's"),
    ],
)
def test_the_cpp_program_says_what_is_wrong(runner, engine, given, reason):
    done = runner(engine, given)

    assert (done.returncode, done.stdout, done.stderr.decode().strip()) == (1, b"", reason)
