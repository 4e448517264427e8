"""transformers' networks, small and offline: loading, preprocessing, positions at another size, what is refused."""

import json

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra: hf)")

from rdeploy import models, resize  # noqa: E402
from rdeploy.build_request import LoadOptions  # noqa: E402
from rdeploy.data import preprocess  # noqa: E402
from rdeploy.errors import ConfigError, Unsupported  # noqa: E402
from rdeploy.models import _hf_known, hf  # noqa: E402
from rdeploy.models._hf_processor import facts_of  # noqa: E402
from rdeploy.resize import input as at_input  # noqa: E402
from rdeploy.types import Preprocessing  # noqa: E402

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
SIZED = {**SMALL, "image_size": 32, "patch_size": 8}
RANDOM = LoadOptions(random_init=True, offline=True)
VIT = {"architectures": ["ViTForImageClassification"], "model_type": "vit", "num_labels": 5, **SIZED}
DINO = {"architectures": ["Dinov2Model"], "model_type": "dinov2", **SIZED}
CLIP = {"architectures": ["CLIPModel"], "model_type": "clip", "projection_dim": 12, "vision_config": SIZED}
SIGLIP = {"architectures": ["SiglipModel"], "model_type": "siglip", "vision_config": SIZED}
SEGFORMER = {
    "architectures": ["SegformerForSemanticSegmentation"], "model_type": "segformer", "num_labels": 4,
    "hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1], "decoder_hidden_size": 16, "sr_ratios": [2, 2, 1, 1],
}  # fmt: skip
CVT = {
    "architectures": ["CvtForImageClassification"], "model_type": "cvt", "num_labels": 5, "depth": [1, 2, 3],
    "embed_dim": [8, 16, 16], "num_heads": [1, 2, 2],
}  # fmt: skip
SWIN = {
    "architectures": ["SwinForImageClassification"], "model_type": "swin", "num_labels": 5, "image_size": 56,
    "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 7,
}  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    """Return `folder(config, processor) -> hf:FOLDER` with these JSON files in it."""

    def write(config, processor=None, name="net"):
        place = tmp_path / name
        place.mkdir()
        (place / "config.json").write_text(json.dumps(config))
        if processor is not None:
            (place / "preprocessor_config.json").write_text(json.dumps(processor))
        return f"hf:{place}"

    return write


@pytest.mark.parametrize(
    ("config", "task", "shape"),
    [
        (VIT, "classification", (1, 5)),
        (DINO, "embedding", (1, 32)),
        (CLIP, "embedding", (1, 12)),
        (SIGLIP, "embedding", (1, 32)),
        (CVT, "classification", (1, 5)),
        (SEGFORMER, "segmentation", (1, 4, 8, 8)),
    ],
    ids=lambda value: value["model_type"] if isinstance(value, dict) else None,
)
def test_each_kind_of_network_returns_one_tensor_and_is_resized(folder, config, task, shape):
    options = LoadOptions(random_init=True, offline=True, native_resolution=(32, 32))
    loaded = models.load(folder(config), options)
    small = at_input.apply(loaded.module, loaded.spec, (16, 24), at_input.Options())

    with torch.no_grad():
        native, resized = loaded.module(torch.rand(1, 3, 32, 32)), small(torch.rand(1, 3, 16, 24))

    assert loaded.spec.task == task
    assert native.shape == shape
    assert resized.shape == (*shape[:2], 4, 6)[: len(shape)]


@pytest.mark.parametrize("config", [VIT, DINO, CLIP, SIGLIP], ids=lambda config: config["model_type"])
def test_positions_are_resampled_once_as_the_network_itself_would_each_time(folder, config):
    loaded = models.load(folder(config), LoadOptions(random_init=True, offline=True, native_resolution=(32, 32)))
    images = torch.rand(2, 3, 16, 24)
    small = at_input.apply(loaded.module, loaded.spec, (16, 24), at_input.Options())
    parts = [part for part in small.modules() if hasattr(part, "interpolate_pos_encoding")]
    native = resize.apply(loaded.module, loaded.spec, ())
    from_native = at_input.apply(native, loaded.spec, (16, 24), at_input.Options())
    assert at_input.snap(native, loaded.spec, (21, 21)) == (24, 24)

    with torch.no_grad():
        torch.testing.assert_close(small(images), loaded.module(images))
        torch.testing.assert_close(from_native(images), small(images))
        torch.testing.assert_close(loaded.module(torch.rand(1, 3, 32, 32)).shape[0], 1)

    assert parts
    graph = torch.export.export(small, (images,)).graph
    assert not any("upsample" in str(node.target) for node in graph.nodes)


def test_a_network_that_was_trained_at_another_size_than_it_is_used_at(folder):
    processor = {"size": {"shortest_edge": 24}, "crop_size": {"height": 16, "width": 16}, "do_center_crop": True}
    loaded = models.load(folder(DINO, processor), RANDOM)
    native = resize.apply(loaded.module, loaded.spec, ())

    embedding = next(part for part in native.modules() if hasattr(part, "position_embeddings"))

    assert loaded.spec.native_resolution == (16, 16)
    assert embedding.position_embeddings.shape == (1, 1 + 4, 32)


def test_the_patch_size_is_what_resolutions_snap_to(folder):
    loaded = models.load(folder(VIT), LoadOptions(random_init=True, offline=True, native_resolution=(32, 32)))

    assert at_input.snap(loaded.module, loaded.spec, (21, 21)) == (24, 24)
    assert "its patches are 8 pixels" in at_input.unsupported(loaded.module, loaded.spec, (20, 20))


def test_windows_that_a_forward_shrinks_for_good_do_not_spoil_the_network(folder):
    loaded = models.load(folder(SWIN), LoadOptions(random_init=True, offline=True, native_resolution=(56, 56)))
    images = torch.rand(1, 3, 56, 56)
    with torch.no_grad():
        before = loaded.module(images)
        reason = at_input.unsupported(loaded.module, loaded.spec, (32, 32))
        after = loaded.module(images)

    assert reason is None
    torch.testing.assert_close(before, after)


def test_a_saved_network_is_loaded_with_its_weights_and_labels(folder, tmp_path):
    torch.manual_seed(3)
    config = transformers.ViTConfig(**SIZED, id2label={0: "cat", 1: "dog"}, label2id={"cat": 0, "dog": 1})
    net = transformers.ViTForImageClassification(config).eval()
    net.save_pretrained(tmp_path / "saved")
    images = torch.rand(1, 3, 32, 32)

    loaded = models.load(f"hf:{tmp_path / 'saved'}", LoadOptions(offline=True, native_resolution=(32, 32)))

    with torch.no_grad():
        torch.testing.assert_close(loaded.module(images), net(images).logits)
    assert loaded.spec.labels == ("cat", "dog")
    assert loaded.spec.name == "saved"


def test_the_key_of_a_folder_follows_its_files(folder):
    source = folder(VIT)
    before = models.source_key(source, RANDOM)
    changed = folder({**VIT, "num_labels": 6}, name="other")

    assert before == models.source_key(source, RANDOM)
    assert before != models.source_key(changed, RANDOM)


def test_pickled_weights_are_not_opened(folder, tmp_path):
    source = folder(VIT)
    torch.save({}, tmp_path / "net" / "pytorch_model.bin")

    with pytest.raises(
        ConfigError, match=r"holds no model.safetensors \(other weights are pickles and are not opened\)"
    ):
        models.load(source, LoadOptions(offline=True))


def test_what_is_not_on_this_machine_is_said_in_one_sentence(monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(
        ConfigError, match=r"the pretrained weights of hf:google/vit-base-patch16-224 are not on this.*--ran"
    ):
        models.load("hf:google/vit-base-patch16-224", LoadOptions(offline=True))
    with pytest.raises(
        ConfigError, match=r"the settings of hf:no/such are not .* use hf:FOLDER with its config.json; known"
    ):
        models.load("hf:no/such", RANDOM)


def test_code_of_the_hub_is_never_run(folder):
    config = {"model_type": "my_own", "auto_map": {"AutoModel": "code.Net"}, "architectures": ["Net"]}

    with pytest.raises(Unsupported, match=r"needs code of the hub \(my_own\), which rdeploy never runs"):
        models.load(folder(config), RANDOM)


@pytest.mark.parametrize(
    ("architecture", "message"),
    [
        ("BertModel", "is a BertModel, which takes no images"),
        ("NoSuchNet", "is a NoSuchNet, which transformers cannot"),
    ],
)
def test_what_is_no_vision_network_is_refused(folder, architecture, message):
    with pytest.raises(Unsupported, match=message):
        models.load(folder({"architectures": [architecture], "model_type": "bert"}), RANDOM)


@pytest.mark.parametrize(
    ("processor", "resolution", "crop_pct", "mode"),
    [
        ({"size": {"height": 384, "width": 512}}, (384, 512), 1.0, "squash"),
        ({"size": 224}, (224, 224), 1.0, "squash"),
        ({"size": {"shortest_edge": 256}, "crop_size": 224, "do_center_crop": True}, (224, 224), 0.875, "center"),
        (
            {"size": {"height": 256, "width": 256}, "crop_size": 224, "do_center_crop": True},
            (224, 224),
            0.875,
            "squash",
        ),
        ({"size": {"shortest_edge": 224}, "crop_pct": 0.875}, (224, 224), 0.875, "center"),
        ({"size": {"shortest_edge": 384}, "crop_pct": 0.875}, (384, 384), 1.0, "squash"),
        (
            {"size": {"shortest_edge": 224}, "crop_pct": 0.9, "crop_size": 224, "do_center_crop": True},
            (224, 224),
            0.9,
            "center",
        ),
        ({}, (96, 96), None, None),
    ],
)
def test_preprocessing_comes_from_the_processor(processor, resolution, crop_pct, mode):
    facts = facts_of({"image_size": 96}, processor, task="classification")

    assert (facts.native_resolution, facts.crop_pct, facts.crop_mode) == (resolution, crop_pct, mode)


def test_normalisation_and_filter_come_from_the_processor():
    told = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.2, 0.2], "resample": 3, "do_normalize": True}
    off = facts_of({}, {**told, "do_normalize": False}, task="embedding")
    facts = facts_of({"id2label": {"1": "b", "0": "a"}}, told, task="classification")

    assert (facts.mean, facts.std, facts.interpolation) == ((0.5, 0.4, 0.3), (0.2, 0.2, 0.2), "bicubic")
    assert (off.mean, off.std) == ((0.0,), (1.0,))
    assert facts.labels == ("a", "b")
    assert facts_of({"id2label": {0: "LABEL_0"}}, told, task="classification").labels == ()


@pytest.mark.parametrize("resample", range(6))
def test_every_filter_is_the_processors(resample):
    names = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")

    assert facts_of({}, {"resample": resample}, task="classification").interpolation == names[resample]


def test_what_efficientnet_does_to_its_pixels_is_followed():
    told = {
        "size": {"height": 8, "width": 8}, "resample": 0, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.3, 0.2, 0.25],
        "rescale_factor": 1 / 127.5, "rescale_offset": True, "include_top": True, "do_center_crop": False,
    }  # fmt: skip
    processor = transformers.EfficientNetImageProcessor(**told)
    facts = facts_of({}, told, task="classification")
    preprocessing = Preprocessing(mean=facts.mean, std=facts.std)
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)

    exact = np.asarray(processor(pixels, return_tensors="np")["pixel_values"])

    np.testing.assert_allclose(preprocess.normalise(pixels[None], preprocessing), exact, rtol=1e-4, atol=1e-4)


def test_pixels_that_are_not_rescaled():
    facts = facts_of({}, {"do_rescale": False, "do_normalize": False}, task="classification")

    assert (facts.mean, facts.std) == ((0.0,), (1 / 255,))


def test_every_known_configuration_names_a_class_of_transformers():
    for name, (architecture, _, processor) in _hf_known.KNOWN.items():
        assert hasattr(transformers, architecture), name
        assert facts_of({}, processor, task="classification").native_resolution, name


YOLOS = {
    "architectures": ["YolosForObjectDetection"], "model_type": "yolos", "num_labels": 3, **SMALL, "image_size": [32, 32],
    "patch_size": 8, "num_detection_tokens": 5,
}  # fmt: skip


def test_a_detector_s_logits_are_named_after_what_makes_them_scores(folder):
    """YOLOS has a class for none; a detector with as many scores as classes has not."""
    loaded = models.load(folder(YOLOS), RANDOM)

    assert loaded.spec.task == "detection"
    assert loaded.module.output_names == ("softmax_logits", "pred_boxes")
    answer = {"logits": torch.zeros(1, 5, 3), "pred_boxes": torch.zeros(1, 5, 4), "last_hidden_state": torch.zeros(1)}
    assert set(hf._queries(answer, 3)) == {"sigmoid_logits", "pred_boxes"}
