"""Images of more channels than a picture has: five bands from an array file, through the real command line."""

import json

import numpy as np
import pytest
from PIL import Image

FACTORY = """\
from digits_model import digits_net


def bands_net():
    net = digits_net()
    weight = net[0][0].weight
    net[0][0].weight = type(weight)(weight.repeat(1, 5, 1, 1) / 5)
    net.pretrained_cfg = net.pretrained_cfg | {"input_size": (5, 32, 32), "mean": (0.5,) * 5, "std": (0.5,) * 5}
    return net
"""


def bands(workplace):
    """Write the digits' weights for five bands, and the digits as arrays (N, H, W, 5): a weak, a usual and three dull bands."""
    torch = pytest.importorskip("torch", reason="the network's weights are PyTorch's")
    folder = workplace.folder
    (folder / "bands_model.py").write_text(FACTORY)
    state = torch.load(folder / "digits.pt", weights_only=True)
    first = next(name for name, tensor in state.items() if tensor.ndim == 4)
    state[first] = torch.cat([state[first] * share for share in (0.3, 0.4, 0.1, 0.1, 0.1)], dim=1)
    torch.save(state, folder / "bands.pt")
    files = sorted((folder / "images").glob("*/*.png"))
    grey = np.stack([np.asarray(Image.open(file)) for file in files])
    labels = np.array([int(file.parent.name) for file in files])
    np.savez(folder / "bands.npz", images=np.stack([grey] * 5, axis=-1), labels=labels)


def test_five_bands_are_reduced_quantized_and_run(workplace):
    bands(workplace)

    done = workplace.run(
        "build", "bands.pt", "--arch", "bands_model:bands_net", "--scale", "0.75", "--int8", "--calib", "bands.npz",
        "--calib-samples", "64", "--data", "bands.npz", "--target", "quick.yaml", "--out", "out",
    )  # fmt: skip

    assert done.returncode == 0, done.stderr
    bundle = workplace.folder / "out" / "bands-r24-int8"
    manifest = json.loads((bundle / "manifest.json").read_text())
    for engine in manifest["engines"]:
        assert engine["verification"]["passed"], engine["verification"]["reasons"]
        assert engine["verification"]["accuracy"]["value"] > 0.8
    import rdeploy

    with np.load(workplace.folder / "bands.npz") as file, rdeploy.load(bundle) as model:
        found = model(file["images"][:50]).argmax(1)
        assert np.mean(found == file["labels"][:50]) > 0.8


def test_a_picture_is_refused_where_the_network_takes_five_bands(workplace):
    bands(workplace)

    done = workplace.run(
        "build", "bands.pt", "--arch", "bands_model:bands_net", "--int8", "--calib", "images", "--target", "quick.yaml"
    )

    assert done.returncode == 2
    assert "5 channels" in done.stderr
    assert "Traceback" not in done.stderr
