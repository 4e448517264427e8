"""The configurations of well-known networks of the hub: what `hf:NAME --random-init` needs without a network."""

from __future__ import annotations

from typing import Any

Known = tuple[str, dict[str, Any], dict[str, Any]]

_IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
_HALF = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
_CLIP = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}
_SQUASH_224 = {"size": {"height": 224, "width": 224}, "resample": 2}
_CROP_224 = {"size": {"shortest_edge": 256}, "crop_size": {"height": 224, "width": 224}, "do_center_crop": True}
_CONVNEXT = {"size": {"shortest_edge": 224}, "crop_pct": 0.875, "resample": 3, **_IMAGENET}

_TINY = {"hidden_size": 192, "num_hidden_layers": 12, "num_attention_heads": 3, "intermediate_size": 768}
_SMALL = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "intermediate_size": 1536}
_B1 = {"hidden_sizes": [64, 128, 320, 512], "depths": [2, 2, 2, 2]}
_B2 = {"hidden_sizes": [64, 128, 320, 512], "depths": [3, 4, 6, 3], "decoder_hidden_size": 768}


def _segformer(side: int, classes: int, **config: Any) -> Known:
    processor = {"size": {"height": side, "width": side}, "resample": 2, **_IMAGENET}
    return "SegformerForSemanticSegmentation", {"num_labels": classes, **config}, processor


def _cvt(depth: list[int]) -> Known:
    return "CvtForImageClassification", {"num_labels": 1000, "depth": depth}, _CONVNEXT


def _clip(patch: int, hidden: int, layers: int, heads: int, projection: int) -> Known:
    vision = {
        "patch_size": patch, "hidden_size": hidden, "intermediate_size": 4 * hidden, "num_hidden_layers": layers,
        "num_attention_heads": heads, "image_size": 224,
    }  # fmt: skip
    processor = {**_CROP_224, "size": {"shortest_edge": 224}, "resample": 3, **_CLIP}
    return "CLIPModel", {"projection_dim": projection, "vision_config": vision}, processor


_VIT, _SEGFORMER = "ViTForImageClassification", "SegformerForSemanticSegmentation"
_HEAD = {"num_labels": 1000}
_DEIT = {**_CROP_224, "resample": 3, **_IMAGENET}
_DINO = {"image_size": 518, "patch_size": 14, "mlp_ratio": 4}
_SIGLIP = {"vision_config": {"image_size": 224, "patch_size": 16}}
_WIDE = {"size": {"height": 512, "width": 1024}, "resample": 2, **_IMAGENET}

KNOWN: dict[str, Known] = {
    "google/vit-base-patch16-224": (_VIT, _HEAD, {**_SQUASH_224, **_HALF}),
    "WinKawaks/vit-tiny-patch16-224": (_VIT, {**_HEAD, **_TINY}, {**_SQUASH_224, **_HALF}),
    "WinKawaks/vit-small-patch16-224": (_VIT, {**_HEAD, **_SMALL}, {**_SQUASH_224, **_HALF}),
    "facebook/deit-tiny-patch16-224": (_VIT, {**_HEAD, **_TINY}, _DEIT),
    "facebook/deit-small-patch16-224": (_VIT, {**_HEAD, **_SMALL}, _DEIT),
    "facebook/dinov2-small": ("Dinov2Model", {**_SMALL, **_DINO}, _DEIT),
    "facebook/dinov2-base": ("Dinov2Model", _DINO, _DEIT),
    "openai/clip-vit-base-patch32": _clip(32, 768, 12, 12, 512),
    "openai/clip-vit-base-patch16": _clip(16, 768, 12, 12, 512),
    "openai/clip-vit-large-patch14": _clip(14, 1024, 24, 16, 768),
    "google/siglip-base-patch16-224": ("SiglipModel", _SIGLIP, {**_SQUASH_224, "resample": 3, **_HALF}),
    "nvidia/mit-b0": ("SegformerForImageClassification", _HEAD, {**_SQUASH_224, **_IMAGENET}),
    "nvidia/segformer-b0-finetuned-ade-512-512": _segformer(512, 150),
    "nvidia/segformer-b0-finetuned-cityscapes-512-1024": (_SEGFORMER, {"num_labels": 19}, _WIDE),
    "nvidia/segformer-b1-finetuned-ade-512-512": _segformer(512, 150, **_B1),
    "nvidia/segformer-b2-finetuned-ade-512-512": _segformer(512, 150, **_B2),
    "microsoft/cvt-13": _cvt([1, 2, 10]),
    "microsoft/cvt-21": _cvt([1, 4, 16]),
    "microsoft/resnet-50": ("ResNetForImageClassification", _HEAD, _CONVNEXT),
    "microsoft/swin-tiny-patch4-window7-224": (
        "SwinForImageClassification",
        _HEAD,
        {**_SQUASH_224, "resample": 3, **_IMAGENET},
    ),
    "facebook/convnext-tiny-224": ("ConvNextForImageClassification", _HEAD, _CONVNEXT),
}
"""NAME -> (architecture, config.json, preprocessor_config.json), each with only what differs from transformers' defaults."""


def described(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what the hub's config.json and preprocessor_config.json of a known network say."""
    architecture, config, processor = KNOWN[name]
    return {"architectures": [architecture], **config}, dict(processor)
