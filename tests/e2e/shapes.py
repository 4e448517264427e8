"""A segmentation network trained on drawn shapes in a few seconds: what the command line is tried on."""

import textwrap
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

SIZE = (48, 64)
FACTORY = """\
import torch
from torch import nn


class ShapesNet(nn.Module):
    '''Scores of background, square and disc at the size of the input, in a dictionary as torchvision's.'''

    def __init__(self):
        super().__init__()
        def block(cin, cout, stride):
            return nn.Sequential(nn.Conv2d(cin, cout, 3, stride, 1, bias=False), nn.BatchNorm2d(cout), nn.ReLU())
        self.body = nn.Sequential(block(3, 16, 2), block(16, 24, 1), block(24, 24, 2), block(24, 24, 1))
        self.head = nn.Conv2d(24, 3, 1)

    def forward(self, images):
        scores = self.head(self.body(images))
        return {"out": nn.functional.interpolate(scores, size=images.shape[-2:], mode="bilinear", align_corners=False)}


def shapes_net():
    net = ShapesNet()
    net.pretrained_cfg = {
        "input_size": (3, 48, 64), "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), "interpolation": "bilinear",
        "crop_pct": 1.0, "crop_mode": "squash", "label_names": ("background", "square", "disc"),
    }
    return net
"""


def draw(rng, size=SIZE):
    """Return an image and its mask: a square (1), a disc (2), an edge that is void (7)."""
    height, width = size
    image = Image.fromarray(rng.integers(0, 90, (height, width, 3), dtype=np.uint8))
    mask = Image.new("L", (width, height), 0)
    for index, colour in ((1, (200, 60, 40)), (2, (60, 190, 80))):
        radius = int(rng.integers(height // 6, height // 3))
        x, y = int(rng.integers(radius, width - radius)), int(rng.integers(radius, height - radius))
        box = (x - radius, y - radius, x + radius, y + radius)
        for canvas, fill in ((image, colour), (mask, index)):
            pen = ImageDraw.Draw(canvas)
            (pen.rectangle if index == 1 else pen.ellipse)(box, fill=fill)
    ImageDraw.Draw(mask).line((0, 0, width, 0), fill=7)
    return image, mask


def train(folder: Path) -> None:
    """Write the factory, its trained weights and 40 images with masks that are twice as large as the network's input."""
    torch = pytest.importorskip("torch", reason="training the test's network needs PyTorch")
    (folder / "shapes_model.py").write_text(textwrap.dedent(FACTORY))
    scope: dict = {}
    exec((folder / "shapes_model.py").read_text(), scope)
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    net = scope["shapes_net"]().train()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    pairs = [draw(rng) for _ in range(48)]
    x = torch.from_numpy(np.stack([np.asarray(i).transpose(2, 0, 1) for i, _ in pairs]).astype(np.float32) / 127.5 - 1)
    y = torch.from_numpy(np.stack([np.asarray(m) for _, m in pairs]).astype(np.int64))
    for _ in range(10):
        for batch in torch.randperm(len(x)).split(8):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(net(x[batch])["out"], y[batch], ignore_index=7).backward()
            optimizer.step()
    torch.save(net.state_dict(), folder / "shapes.pt")
    for part in ("images", "masks"):
        (folder / "scenes" / part).mkdir(parents=True)
    for index in range(40):
        image, mask = draw(rng, (SIZE[0] * 2, SIZE[1] * 2))
        image.save(folder / "scenes" / "images" / f"{index:03}.png")
        mask.save(folder / "scenes" / "masks" / f"{index:03}.png")
