"""Small networks to train on a CPU: a residual network and a vision transformer for CIFAR-10, a segmenter for CamVid."""

from __future__ import annotations

from typing import Any

import torch
import torchvision
from timm.layers import PatchEmbed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
CIFAR = {"input_size": (3, 32, 32), "mean": CIFAR_MEAN, "std": CIFAR_STD, "crop_pct": 1.0, "interpolation": "bicubic"}
"""What `rdeploy build trained:ResNet` reads of the network."""
CAMVID_CLASSES, CAMVID_SIZE = 11, (180, 240)


class Block(nn.Module):
    """Two 3 x 3 convolutions and a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        inner = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(inner)) + self.shortcut(x))


class ResNet(nn.Module):
    """Three blocks of 48, 96 and 192 channels on 16, 8 and 4 pixels: 24 MMACs at 32 x 32."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 32, 3, 1, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU())
        self.blocks = nn.Sequential(Block(32, 48, 2), Block(48, 96, 2), Block(96, 192, 2))
        self.head = nn.Linear(192, classes)
        self.default_cfg = CIFAR

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


class Stem(PatchEmbed):
    """Patches of 4 pixels by three 3 x 3 convolutions: with so few passes over the data a plain projection learns little."""

    def __init__(self, img_size: int = 32, patch_size: int = 4, embed_dim: int = 96, **unused: Any) -> None:
        super().__init__(img_size=img_size, patch_size=patch_size, embed_dim=embed_dim)
        widths = (32, 64, embed_dim)
        layers: list[nn.Module] = []
        for inputs, outputs, stride in zip((3, *widths), widths, (1, 2, 2)):
            layers += [nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
        self.proj = nn.Sequential(*layers[:-1])


class ViT(VisionTransformer):
    """timm's transformer: 64 tokens, three layers of 96 channels behind a convolutional stem: 33 MMACs at 32 x 32."""

    def __init__(self, classes: int = 10, width: int = 96, depth: int = 3, heads: int = 3) -> None:
        super().__init__(
            img_size=32,
            patch_size=4,
            num_classes=classes,
            global_pool="avg",
            class_token=False,
            embed_dim=width,
            depth=depth,
            num_heads=heads,
            embed_layer=Stem,
        )
        self.default_cfg = CIFAR


class Segmenter(nn.Module):
    """MobileNetV2's features, at strides 8 and 32, and a light head; logits come out at an eighth of the size, enlarged."""

    def __init__(self, classes: int = CAMVID_CLASSES) -> None:
        super().__init__()
        features = torchvision.models.mobilenet_v2().features
        self.low, self.high = features[:7], features[7:18]
        self.high_head = nn.Sequential(nn.Conv2d(320, 96, 1, bias=False), nn.BatchNorm2d(96), nn.ReLU())
        self.low_head = nn.Sequential(nn.Conv2d(32, 96, 1, bias=False), nn.BatchNorm2d(96), nn.ReLU())
        self.mix = nn.Sequential(nn.Conv2d(192, 96, 3, 1, 1, bias=False), nn.BatchNorm2d(96), nn.ReLU())
        self.out = nn.Conv2d(96, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        low = self.low(x)
        high = self.high_head(self.high(low))
        high = F.interpolate(high, size=low.shape[2:], mode="bilinear", align_corners=False)
        mixed = self.mix(torch.cat([self.low_head(low), high], 1))
        return F.interpolate(self.out(mixed), size=x.shape[2:], mode="bilinear", align_corners=False)


NETWORKS = {"resnet_cifar": ResNet, "vit_cifar": ViT, "segmenter_camvid": Segmenter}
