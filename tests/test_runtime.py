import json
import subprocess
import sys
import threading

import numpy as np
import pytest
from PIL import Image

from rdeploy import api, backends, bundle, hardware, runtime
from rdeploy.errors import ConfigError, MissingDependency, StageError, Unsupported
from rdeploy.types import TensorInfo

pytestmark = pytest.mark.filterwarnings("error")

LOGITS = np.array([[1.0, 0.0, 0.0], [0.0, 2.0, 0.0], [0.0, 0.0, 3.0]], np.float32)


class FakeSession:
    """Classifies by colour: logits = mean of each channel x LOGITS; as a static batch of `batch` or a dynamic one."""

    def __init__(self, batch):
        self.inputs = (TensorInfo(name="x", dtype="float32", shape=(batch, 3, 6, 6)),)
        self.outputs = (TensorInfo(name="y", dtype="float32", shape=(batch, 3)),)
        self.fed = []
        self.entered = self.left = 0
        self.running = 0

    def __enter__(self):
        self.entered += 1
        return self

    def __exit__(self, *details):
        self.left += 1

    def run(self, inputs):
        self.running += 1
        assert self.running == 1, "two threads in one session"
        batch = inputs["x"]
        self.fed.append(batch.shape)
        result = {"y": batch.mean(axis=(2, 3)) @ LOGITS}
        self.running -= 1
        return result


class FakeBackend:
    def __init__(self, *, reason=None, error=None, batch=-1):
        self.reason, self.error = reason, error
        self.session = FakeSession(batch)

    def cannot_run(self, engine):
        return self.reason

    def open_session(self, path, *, threads=None):
        assert path.is_file()
        if self.error:
            raise self.error
        return self.session


@pytest.fixture
def machine(monkeypatch):
    """Which backends this machine pretends to have; by default all run but the one for the GPU."""
    found = {
        "tensorrt_rtx": FakeBackend(reason="no NVIDIA driver here"),
        "openvino": FakeBackend(),
        "onnxruntime": FakeBackend(batch=1),
    }
    monkeypatch.setattr(backends, "find", found.__getitem__)
    return found


def colour(red, green, blue, size=(9, 12)):
    return np.broadcast_to(np.array([red, green, blue], np.uint8), (*size, 3)).copy()


def load(folder, **options):
    with pytest.warns(UserWarning, match="passed over"):
        return runtime.load(folder, **options)


def test_the_first_engine_that_runs_here_is_taken_and_the_others_are_named(written, machine):
    with pytest.warns(UserWarning, match="using openvino; passed over tensorrt_rtx: no NVIDIA driver here"):
        model = runtime.load(written)

    assert model.backend == "openvino"


@pytest.mark.parametrize(
    ("backend", "driver", "said"),
    [
        ("openvino", None, "with avx512_vnni, which"),
        ("tensorrt_rtx", "580.95.05", None),
        ("tensorrt_rtx", "535.104.12", "built with driver 580.95.05, this is 535.104.12"),
    ],
)
def test_a_machine_that_is_not_quite_that_which_built_the_engine_is_told(
    written, machine, monkeypatch, backend, driver, said
):
    machine["tensorrt_rtx"].reason = None
    monkeypatch.setattr(hardware, "cpu_flags", lambda: frozenset({"avx2"}))
    monkeypatch.setattr(hardware, "driver_version", lambda: driver)
    manifest = bundle.read(written)
    (entry,) = [one for one in manifest["engines"] if one["backend"] == backend]
    facts = {"cpu_flags": ["avx2", "avx512_vnni"], "driver": "580.95.05"}

    file, told = runtime.usable(written, manifest, {**entry, "fingerprint": facts})

    assert file is not None
    assert (said in told) if said else told is None


def test_an_engine_whose_runtime_refuses_it_is_passed_over(written, machine):
    machine["openvino"].error = StageError("run", "an IR of another version")

    with pytest.warns(UserWarning, match="openvino: run: an IR of another version"):
        model = runtime.load(written)

    assert model.backend == "onnxruntime"


def test_a_machine_that_runs_none_of_them_is_told_why_for_each(written, machine):
    for backend in machine.values():
        backend.reason = backend.reason or "not installed; pip install it"

    with pytest.raises(MissingDependency) as caught:
        runtime.load(written)

    assert "no engine of this bundle runs on this machine" in str(caught.value)
    assert "tensorrt_rtx: no NVIDIA driver here; openvino: not installed; pip install it" in str(caught.value)


def test_a_backend_that_is_named_is_taken_or_refused(written, machine):
    assert runtime.load(written, backend="onnxruntime").backend == "onnxruntime"
    with pytest.raises(MissingDependency, match="tensorrt_rtx: no NVIDIA driver here"):
        runtime.load(written, backend="tensorrt_rtx")
    with pytest.raises(ConfigError, match="has no tensorrt; its engines: tensorrt_rtx, openvino, onnxruntime"):
        runtime.load(written, backend="tensorrt")


def test_a_damaged_engine_is_refused_instead_of_passed_over(written, machine):
    (written / "engines" / "openvino" / "openvino.bin").write_bytes(b"Weights")

    with pytest.raises(ConfigError, match=r"openvino\.bin was truncated or changed"):
        runtime.load(written)


def test_an_engine_that_failed_verification_runs_only_by_name(written, machine):
    content = json.loads((written / "manifest.json").read_text())
    for engine in content["engines"]:
        engine["verification"] = {"passed": False}
    (written / "manifest.json").write_text(json.dumps(content))
    bundle.seal(written)

    with pytest.raises(ConfigError, match="every engine of this bundle failed verification; name a --backend"):
        runtime.load(written)
    assert runtime.load(written, backend="openvino").backend == "openvino"


def test_images_of_every_kind_give_the_same_rows(written, machine, tmp_path):
    pixels = colour(255, 0, 127)
    path = tmp_path / "red.png"
    Image.fromarray(pixels).save(path)
    with load(written) as model:
        expected = model(pixels)
        kinds = [str(path), path, Image.fromarray(pixels), pixels / 255.0, pixels[None], [path], [pixels[None]]]

        assert expected.shape == (1, 3)
        for images in kinds:
            np.testing.assert_allclose(model(images), expected, atol=1e-6)


def test_preprocessing_is_the_manifests(written, machine):
    with load(written) as model:
        logits = model(colour(255, 0, 0))

    # mean 0.5 and std 0.5 turn 0 and 255 into -1 and 1.
    np.testing.assert_allclose(logits, [[1.0, -2.0, -3.0]], atol=1e-6)


def test_many_images_run_in_pieces_and_come_back_in_order(written, machine):
    images = np.stack([colour(value, 0, 0) for value in range(0, 200, 5)])
    with load(written) as model:
        logits = model(images)

    assert [shape[0] for shape in machine["openvino"].session.fed] == [16, 16, 8]
    assert logits.shape == (40, 3)
    assert (np.diff(logits[:, 0]) > 0).all()


class StreamingSession(FakeSession):
    """Says in which order batches are asked for and answered, with one batch under way while the next is prepared."""

    def stream(self, batches):
        self.order, waiting = [], []
        for batch in batches:
            self.order.append("fed")
            waiting.append(self.run(batch))
            if len(waiting) > 1:
                self.order.append("told")
                yield waiting.pop(0)
        yield from waiting


@pytest.mark.parametrize("batch", [-1, 8])
def test_many_images_are_streamed_where_the_session_can(written, machine, batch):
    machine["openvino"].session = session = StreamingSession(batch)
    images = np.stack([colour(value, 0, 0) for value in range(0, 250, 5)])

    with load(written) as model:
        logits = model(images)

    assert session.order[:4] == ["fed", "fed", "told", "fed"]
    assert {shape[0] for shape in session.fed[:-1]} == {16 if batch < 0 else 8}
    assert logits.shape == (50, 3)
    assert (np.diff(logits[:, 0]) > 0).all()


def test_evaluate_streams_its_images(written, machine, tmp_path):
    machine["openvino"].session = session = StreamingSession(-1)
    machine["openvino"].version = lambda: "1.0"
    for label, image in (("red", colour(255, 0, 0)), ("green ish", colour(0, 255, 0)), ("blue", colour(0, 0, 255))):
        (tmp_path / "data" / label).mkdir(parents=True)
        for index in range(12):
            Image.fromarray(image).save(tmp_path / "data" / label / f"{index}.png")

    with pytest.warns(UserWarning, match="passed over"):
        found = api.evaluate(written, tmp_path / "data")

    assert session.order[:4] == ["fed", "fed", "told", "fed"]
    assert (found.accuracy.value, found.accuracy.samples) == (1.0, 36)


def test_one_batch_is_not_streamed(written, machine):
    machine["openvino"].session = session = StreamingSession(-1)
    with load(written) as model:
        model([colour(255, 0, 0)] * 16)

    assert not hasattr(session, "order")


def test_tensorrt_gets_no_larger_batch_than_it_was_built_for(written, machine):
    machine["tensorrt_rtx"].reason = None
    with runtime.load(written) as model:
        model.manifest["build"] = {"batch_sizes": [1, 4]}
        model([colour(255, 0, 0)] * 6)

    assert [shape[0] for shape in machine["tensorrt_rtx"].session.fed] == [4, 2]


def test_a_static_batch_is_filled_up_and_cut_again(written, machine):
    machine["openvino"].session = FakeSession(4)
    with load(written) as model:
        logits = model([colour(255, 0, 0), colour(0, 255, 0), colour(0, 0, 255)] * 2)

    assert [shape[0] for shape in machine["openvino"].session.fed] == [4, 4]
    assert logits.argmax(axis=1).tolist() == [0, 1, 2, 0, 1, 2]


def test_top_gives_labels_and_probabilities_best_first(written, machine):
    with load(written) as model:
        best = model.top(colour(0, 255, 0), k=2)

    powers = np.exp([-1.0, 2.0, -3.0])
    assert [(index, label) for index, label, _ in best] == [(1, "green ish"), (0, "red")]
    assert [probability for *_, probability in best] == pytest.approx(sorted(powers / powers.sum())[:0:-1])


def test_top_without_labels_names_the_index_and_ends_with_the_classes(written, machine):
    (written / "labels.txt").unlink()
    with load(written) as model:
        best = model.top(colour(0, 0, 255), k=9)

    assert [label for _, label, _ in best] == ["2", "0", "1"]


def test_an_output_that_is_a_distribution_already_stays_as_it_is():
    given = np.array([[0.2, 0.5, 0.3]])

    np.testing.assert_array_equal(runtime.softmax(given), given)


def test_softmax_of_large_logits_does_not_overflow():
    np.testing.assert_allclose(runtime.softmax(np.array([[1000.0, 0.0]])), [[1.0, 0.0]], atol=1e-12)


def test_top_of_a_dense_output_says_that_it_needs_a_classifier(written, machine):
    with load(written) as model:
        machine["openvino"].session.run = lambda inputs: {"y": np.zeros((1, 3, 4, 4), np.float32)}
        with pytest.raises(Unsupported, match="top-k needs a classifier's output"):
            model.top(colour(1, 2, 3))


def test_several_outputs_come_back_by_name(written, machine):
    with load(written) as model:
        machine["openvino"].session.run = lambda inputs: {"a": np.zeros((1, 2)), "b": np.ones((1, 3))}
        outputs = model(colour(1, 2, 3))

    assert {name: array.shape for name, array in outputs.items()} == {"a": (1, 2), "b": (1, 3)}


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([], "no images"),
        (np.zeros((0, 4, 4, 3), np.uint8), "no images"),
        (np.zeros(5, np.uint8), r"shape \(H, W, C\) or \(N, H, W, C\), not \(5,\)"),
        (np.full((4, 4, 3), 255.0), "must lie in 0..1"),
        (np.full((4, 4, 3), np.nan), "must lie in 0..1"),
        ("absent.jpg", r"absent\.jpg could not be read: no such file"),
    ],
)
def test_what_is_no_image_is_refused_in_one_sentence(written, machine, images, message):
    with load(written) as model, pytest.raises(ConfigError, match=message) as caught:
        model(images)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "damage", [lambda data: b"", lambda data: data[: len(data) // 2], lambda data: b"GIF89a" + data]
)
def test_a_corrupt_image_file_is_refused_in_one_sentence(written, machine, tmp_path, damage):
    path = tmp_path / "photo.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(path)
    path.write_bytes(damage(path.read_bytes()))

    with load(written) as model, pytest.raises(ConfigError, match=r"photo\.jpg could not be read") as caught:
        model(path)
    assert "\n" not in str(caught.value)


def test_closing_frees_the_engine_once_and_calling_afterwards_says_so(written, machine):
    with load(written) as model:
        pass
    model.close()

    assert machine["openvino"].session.left == 1
    with pytest.raises(ConfigError, match="this model was closed; load the bundle again"):
        model(colour(1, 2, 3))


def test_threads_share_a_model_one_call_at_a_time(written, machine):
    errors = []

    def work(model):
        try:
            for _ in range(20):
                model(colour(1, 2, 3))
        except AssertionError as error:
            errors.append(error)

    with load(written) as model:
        threads = [threading.Thread(target=work, args=(model,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    assert errors == []
    assert len(machine["openvino"].session.fed) == 80


def test_a_bundle_runs_on_a_real_runtime(tiny_bundle):
    with runtime.load(tiny_bundle, threads=1) as model:
        logits = model([colour(255, 0, 0), colour(0, 255, 0)])

    np.testing.assert_allclose(logits, [[1, -2, -3], [-1, 2, -3]], atol=1e-5)


_ALONE = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked}:
            raise ImportError(name + " is blocked in this test")

sys.meta_path.insert(0, Blocker())
import rdeploy
with rdeploy.load(sys.argv[1]) as model:
    print(model.top(sys.argv[2], k=1)[0][1])
"""


def test_running_a_bundle_needs_neither_torch_nor_onnx_nor_scipy(tmp_path, tiny_bundle):
    Image.fromarray(colour(0, 0, 255)).save(tmp_path / "blue.png")
    blocked = {
        "torch",
        "onnx",
        "onnx_ir",
        "onnxscript",
        "scipy",
        "timm",
        "torchvision",
        "rich",
        "click",
        "yaml",
        "psutil",
    }

    shown = subprocess.run(
        [sys.executable, "-c", _ALONE.format(blocked=sorted(blocked)), tiny_bundle, tmp_path / "blue.png"],
        capture_output=True,
        text=True,
        check=False,
    )

    assert shown.stderr == ""
    assert shown.stdout.strip() == "blue"
