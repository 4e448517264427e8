"""A network trained on scikit-learn's digits, and the demonstration's EfficientNet-Lite0: what the real CLI is run on."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]

TARGET = """\
description: any CPU, measured briefly
backends: [onnxruntime, openvino]
timing: {min_samples: 70, max_samples: 140, min_time_s: 0.05, max_time_s: 0.5, max_warmup_s: 0.3}
"""

FACTORY = """\
from torch import nn


def digits_net():
    def block(cin, cout, stride):
        return nn.Sequential(nn.Conv2d(cin, cout, 3, stride, 1, bias=False), nn.BatchNorm2d(cout), nn.ReLU())

    net = nn.Sequential(
        block(1, 16, 1), block(16, 32, 2), block(32, 32, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)
    )
    net.pretrained_cfg = {
        "input_size": (1, 32, 32), "mean": (0.5,), "std": (0.5,), "interpolation": "bilinear", "crop_pct": 1.0,
    }
    return net
"""


class Workplace:
    """A folder with the user's things in it, and the command line run there in a process of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.cache = folder / "cache"

    def environment(self) -> dict[str, str]:
        paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        return {**os.environ, "RDEPLOY_CACHE": str(self.cache), "PYTHONPATH": paths, "COLUMNS": "140"}

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "rdeploy", *arguments],
            cwd=self.folder,
            env=self.environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        child = self.start(*arguments)
        out, err = child.communicate(timeout=300)
        return subprocess.CompletedProcess(child.args, child.returncode, out, err)


def train_digits(folder: Path) -> None:
    """Train the digits network for a few seconds and save its weights, its factory and 400 labelled images."""
    torch = pytest.importorskip("torch", reason="training the test's network needs PyTorch")
    datasets = pytest.importorskip("sklearn.datasets", reason="the digits come with scikit-learn")
    (folder / "digits_model.py").write_text(textwrap.dedent(FACTORY))
    digits = datasets.load_digits()
    pixels = (digits.images * (255 / 16)).astype(np.uint8)
    large = np.stack([np.asarray(Image.fromarray(p).resize((32, 32), Image.Resampling.BILINEAR)) for p in pixels])
    scope: dict = {}
    exec((folder / "digits_model.py").read_text(), scope)
    torch.manual_seed(0)
    net = scope["digits_net"]()
    x = torch.from_numpy(large[:1397, None].astype(np.float32) / 127.5 - 1)
    y = torch.from_numpy(digits.target[:1397])
    epochs, size = 10, 32
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=epochs * (len(x) // size))
    for _ in range(epochs):
        for batch in torch.randperm(len(x))[: len(x) // size * size].split(size):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(net(x[batch]), y[batch]).backward()
            optimizer.step()
            schedule.step()
    torch.save(net.state_dict(), folder / "digits.pt")
    for index in range(1397, 1797):
        place = folder / "images" / str(digits.target[index])
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(large[index]).save(place / f"{index}.png")


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> Path:
    """The folder with the trained digits network; copied by whoever changes something."""
    folder = tmp_path_factory.mktemp("trained")
    train_digits(folder)
    (folder / "quick.yaml").write_text(TARGET)
    return folder


@pytest.fixture(scope="module")
def workplace(trained, tmp_path_factory) -> Workplace:
    import shutil

    folder = tmp_path_factory.mktemp("workplace")
    shutil.copytree(trained, folder, dirs_exist_ok=True)
    return Workplace(folder)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Workplace:
    """A workplace with the trained segmentation network of `shapes` and its images with masks."""
    from . import shapes

    folder = tmp_path_factory.mktemp("scenes")
    shapes.train(folder)
    (folder / "quick.yaml").write_text(TARGET)
    return Workplace(folder)


BUILD = (
    "build", "digits.pt", "--arch", "digits_model:digits_net", "--scale", "0.75", "--int8",
    "--calib", "images", "--calib-samples", "120", "--data", "images", "--target", "quick.yaml", "--out", "out",
)  # fmt: skip
BUNDLE = "digits-r24-int8"
