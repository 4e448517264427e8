"""Small networks to train on a CPU: a residual network and a vision transformer for CIFAR-10, a segmenter for CamVid."""

from __future__ import annotations

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
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

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


class Layer(nn.Module):
    """A pre-norm transformer layer."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, tokens, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).reshape(n, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, tokens, width)
        x = x + self.proj(mixed)
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class ViT(nn.Module):
    """Patches of 4, 64 tokens, six layers of 96 channels: 44 MMACs at 32 x 32."""

    def __init__(self, classes: int = 10, width: int = 96, depth: int = 6, heads: int = 3) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, width, 4, 4)
        self.position = nn.Parameter(torch.randn(1, 64, width) * 0.02)
        self.layers = nn.Sequential(*(Layer(width, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patch(x).flatten(2).transpose(1, 2) + self.position
        return self.head(self.norm(self.layers(tokens)).mean(1))


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
