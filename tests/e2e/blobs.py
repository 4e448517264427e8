"""A detector that is right by construction: squares of 16 pixels on its grid, red ones and green ones."""

from pathlib import Path

import numpy as np
from PIL import Image

FACTORY = """\
import torch
from torch import nn


class Blobs(nn.Module):
    '''(N, 4 + 2, A) as YOLOv8: a candidate every 8 pixels, 16 pixels large, certain where it is all red or all green.'''

    def __init__(self):
        super().__init__()
        self.colour = nn.Conv2d(3, 2, 1)
        self.pool = nn.AvgPool2d(16, 8, 4)
        with torch.no_grad():
            self.colour.weight.copy_(torch.tensor([[1.0, -1.0, -1.0], [-1.0, 1.0, -1.0]]).reshape(2, 3, 1, 1))
            self.colour.bias.zero_()

    def forward(self, images):
        scores = torch.sigmoid(20 * (self.pool(self.colour(images).relu()) - 0.75))
        rows, columns = scores.shape[2:]
        y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
        centres = torch.stack([x, y]).float() * 8 + 4
        boxes = torch.cat([centres, torch.full_like(centres, 16.0)]).expand(len(images), -1, -1, -1)
        return torch.cat([boxes, scores], dim=1).flatten(2)


def blobs():
    net = Blobs()
    net.pretrained_cfg = {
        "input_size": (3, 64, 96), "mean": (0.0,) * 3, "std": (1.0,) * 3, "interpolation": "bilinear", "crop_pct": 1.0,
        "label_names": ("red", "green"),
    }
    return net
"""


def write(folder: Path) -> None:
    """Write the factory and 12 images twice as large as the input, with a red and a green square in each."""
    (folder / "blobs_model.py").write_text(FACTORY)
    for part in ("images", "labels"):
        (folder / "streets" / part).mkdir(parents=True)
    rng = np.random.default_rng(0)
    for index in range(12):
        pixels, lines = np.zeros((64, 96, 3), np.uint8), []
        for colour, half in ((0, 0), (1, 6)):
            column, row = int(rng.integers(1, 5)) + half, int(rng.integers(1, 7))
            left, top = 8 * column - 4, 8 * row - 4
            pixels[top : top + 16, left : left + 16, colour] = 255
            lines.append(f"{colour} {(left + 8) / 96} {(top + 8) / 64} {16 / 96} {16 / 64}")
        large = Image.fromarray(pixels).resize((192, 128), Image.Resampling.NEAREST)
        large.save(folder / "streets/images" / f"{index:02}.png")
        (folder / "streets/labels" / f"{index:02}.txt").write_text("\n".join(lines))
