"""The folder in which the documentation's commands run: small networks under the names of large ones, images, a bundle.

The commands, the graphs, the engines and the measurements are real; what is small is the network, and how long is measured.
"""

import dataclasses
import inspect
import shutil
from pathlib import Path

import numpy as np
from PIL import Image

from rdeploy import targets
from rdeploy.cli import execute
from rdeploy.models import download
from rdeploy.types import Timing

CLASSES, FEATURES, NAMES = 4, 24, 1000
COLOURS = ((200, 60, 60), (60, 180, 70), (70, 90, 200), (190, 170, 60))
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225), "interpolation": "bicubic"}
QUICK = Timing(min_samples=64, max_samples=70, min_time_s=0.02, max_time_s=0.3, max_warmup_s=0.1)


def classifier(seed, samples=None):
    """A small ResNet-like network for 224 px; with labelled images its last layer is fitted, in closed form."""
    import torch
    from torch import nn

    torch.manual_seed(seed)

    def block(cin, cout, stride):
        return nn.Sequential(nn.Conv2d(cin, cout, 3, stride, 1, bias=False), nn.BatchNorm2d(cout), nn.ReLU())

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.layer1 = block(3, 8, 4), block(8, 16, 2)
            self.layer2 = block(16, FEATURES, 2)
            self.fc = nn.Linear(FEATURES, NAMES)

        def features(self, images):
            return self.layer2(self.layer1(self.conv1(images))).mean((2, 3))

        def forward(self, images):
            return self.fc(self.features(images))

    net = Net().eval()
    with torch.no_grad():
        net.fc.weight[CLASSES:] *= 0.01
        net.fc.bias[CLASSES:] = -3.0
        if samples is not None:
            seen = net.features(samples[0])
            inputs = torch.cat([seen, torch.ones(len(seen), 1)], 1)
            wanted = nn.functional.one_hot(samples[1], CLASSES) * 8.0 - 4.0
            found = torch.linalg.solve(inputs.T @ inputs + 1e-4 * torch.eye(FEATURES + 1), inputs.T @ wanted)
            net.fc.weight[:CLASSES], net.fc.bias[:CLASSES] = found[:-1].T, found[-1]
    net.pretrained_cfg = {"input_size": (3, 224, 224), "crop_pct": 1.0, **IMAGENET}
    return net


def transformer(size, patch, classes):
    from timm.models.vision_transformer import VisionTransformer

    net = VisionTransformer(img_size=size, patch_size=patch, embed_dim=32, depth=4, num_heads=2, num_classes=classes)
    net.pretrained_cfg = {"input_size": (3, size, size), "crop_pct": 1.0, **IMAGENET}
    return net.eval()


def segmenter():
    import torch
    from torch import nn

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(3, 8, 3, 4, 1), nn.ReLU(), nn.Conv2d(8, 21, 1))

        def forward(self, images):
            scores = nn.functional.interpolate(self.body(images), size=images.shape[-2:], mode="bilinear")
            return {"out": scores}

    torch.manual_seed(3)
    return Net().eval()


def draw(folder: Path, name: str, kind: int, rng, size=(224, 224)) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    texture = rng.normal(0, 25, (size[0] // 8, size[1] // 8, 3)).repeat(8, 0).repeat(8, 1)
    pixels = np.clip(np.asarray(COLOURS[kind]) + texture + rng.normal(0, 8, (*size, 3)), 0, 255).astype(np.uint8)
    Image.fromarray(pixels).save(folder / name)
    return folder / name


def substitute(monkeypatch, weights: Path) -> None:
    """Put the small networks under the names of the documentation's, and measure briefly."""
    import timm
    import torch
    import torchvision

    def from_timm(name, **_):
        if name.startswith("vit"):
            torch.manual_seed(1)
            return transformer(112, 14, 0) if "dinov2" in name else transformer(224, 16, NAMES)
        net = classifier(0)
        net.load_state_dict(torch.load(weights))
        return net

    def from_torchvision(name, **_):
        return segmenter() if name.startswith("lraspp") else classifier(0)

    load = targets.load
    monkeypatch.setattr(timm, "create_model", from_timm)
    monkeypatch.setattr(torchvision.models, "get_model", from_torchvision)
    monkeypatch.setattr(download, "_answers", lambda host: True)
    monkeypatch.setattr(targets, "load", lambda name: dataclasses.replace(load(name), timing=QUICK))


def fill(folder: Path) -> None:
    """Write images, weights and a factory into the folder."""
    import torch

    rng = np.random.default_rng(0)
    pixels, labels = [], []
    for index in range(24):
        kind = index % CLASSES
        draw(folder / "photos", f"{index:02}.jpg", kind, rng)
        file = draw(folder / "labelled" / str(kind), f"{index:02}.png", kind, rng)
        pixels.append((np.asarray(Image.open(file), np.float32) / 255 - IMAGENET["mean"]) / IMAGENET["std"])
        labels.append(kind)
    for index in range(384):  # the least that fine-tuning takes
        draw(folder / "unlabelled", f"{index:03}.png", index % CLASSES, rng, (56, 56))
    for name in ("photo.jpg", "photo.png", "a.jpg", "b.jpg"):
        draw(folder, name, 1, rng)
    for index in range(6):
        draw(folder / "street" / "val" / "images", f"{index}.png", index % CLASSES, rng, (120, 160))
        mask = rng.integers(0, 12, (15, 20), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
        (folder / "street" / "val" / "masks").mkdir(exist_ok=True)
        Image.fromarray(mask).save(folder / "street" / "val" / "masks" / f"{index}.png")
    samples = torch.from_numpy(np.stack(pixels)).float().permute(0, 3, 1, 2), torch.tensor(labels)
    torch.save(classifier(0, samples).state_dict(), folder / "weights.pt")
    (folder / "my_package").mkdir()
    (folder / "my_package" / "__init__.py").touch()
    (folder / "my_package" / "models.py").write_text(_factory())


def _factory() -> str:
    facts = f"CLASSES, FEATURES, NAMES, IMAGENET = {CLASSES}, {FEATURES}, {NAMES}, {IMAGENET}\n"
    return f"{facts}\n{inspect.getsource(classifier)}\ndef factory():\n    return classifier(2)\n"


def build(folder: Path) -> None:
    """Build the bundles that the documentation's placeholders stand for; the folder is the current one."""
    common = ["build", "timm:resnet50", "--calib", "photos", "--data", "labelled", "--recipe", "fast"]
    assert execute([*common, "--scale", "0.75", "--int8", "--out", "run"]) == 0
    assert execute([*common, "--scale", "1", "--fp32", "--batch", "1", "--batch", "16", "--out", "native"]) == 0
    native, small = folder / "native" / "resnet50-r224-fp32", folder / "run" / "resnet50-r168-int8"
    for name in ("BUNDLE", "CURRENT", "BASELINE", "resnet50-r168-int8", "FOLDER/resnet50-r168-int8"):
        shutil.copytree(small, folder / name)
    shutil.copytree(native, folder / "NATIVE_BUNDLE")
    shutil.copyfile(native / "model.onnx", folder / "MODEL.onnx")
    shutil.rmtree(folder / "native")
