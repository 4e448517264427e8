"""What the steps of the ladder are tried on: tiny networks, and images that lie in an array."""

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

from torch import nn  # noqa: E402

from rdeploy.adapt import Choosing, Subject, _torch, answers_of  # noqa: E402
from rdeploy.types import ModelSpec, Preprocessing  # noqa: E402

PLAIN = Preprocessing(mean=(0.5,) * 3, std=(0.25,) * 3, interpolation="bilinear", crop_pct=0.875)


def spec_of(task="classification", size=(16, 16)):
    return ModelSpec(name="net", source="net", sha256="", native_resolution=size, preprocessing=PLAIN, task=task)


class Pictures:
    """Images that are the same under every preprocessing."""

    def __init__(self, pixels):
        self.array = pixels

    def __len__(self):
        return len(self.array)

    def pixels(self, preprocessings, rows):
        return [self.array[list(rows)] for _ in preprocessings]


class Views:
    """Training images without any randomness: every second row and column is what the variant sees."""

    def __init__(self, large, labels=None):
        self.large, self.labels = large, labels

    def __len__(self):
        return len(self.large)

    @property
    def labelled(self):
        return self.labels is not None

    def batch(self, epoch, rows):
        large = self.large[list(rows)]
        return large, np.ascontiguousarray(large[:, ::2, ::2])

    def truth(self, epoch, rows):
        return None if self.labels is None else np.array([self.labels[row] for row in rows], np.int64)


def blobs(count, side=16, seed=0):
    """Return images of four kinds, by the quarter that is bright, and their kinds."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 120, (count, side, side, 3), dtype=np.uint8)
    kinds = rng.integers(0, 4, count)
    half = side // 2
    for image, kind in zip(images, kinds):
        top, left = kind // 2 * half, kind % 2 * half
        image[top : top + half, left : left + half] += 90
    return images, kinds


def network(channels=8):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, channels, 3, 1, 1, bias=False), nn.BatchNorm2d(channels), nn.ReLU(),
        nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(16 * channels, 4),
    )  # fmt: skip


@pytest.fixture(scope="session")
def trained():
    """A network that tells the four kinds apart at 16 pixels."""
    net = network()
    net[1].momentum = 0.5  # so few steps would leave the statistics of the beginning in them
    images, kinds = blobs(256)
    x = _torch.normalised(torch.from_numpy(images), PLAIN, torch.device("cpu"))
    optimizer = torch.optim.AdamW(net.parameters(), 2e-2)
    for _ in range(15):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), torch.from_numpy(kinds)).backward()
        optimizer.step()
    return net.eval()


def subject(module, native, *, task="classification", images=None, labels=None, training=None, folder=None, **more):
    """Return a subject whose variant sees every second row and column of images that both are compared on."""
    large = blobs(96, seed=5)[0] if images is None else images
    spec = spec_of(task)
    answers = answers_of(_torch.runner(native, spec), large, spec)
    return Subject(
        name="r8",
        spec=spec,
        resolution=(8, 8),
        preprocessing=PLAIN,
        module=module,
        native=native,
        run=_torch.runner(module, spec),
        choosing=Choosing(pictures=Pictures(np.ascontiguousarray(large[:, ::2, ::2])), native=answers, labels=labels),
        training=training,
        folder=folder,
        tell=more.pop("tell", lambda message: None),
        **more,
    )
