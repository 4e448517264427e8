"""Our pixels against timm's and torchvision's own transforms, bit for bit, and against values known in closed form."""

import numpy as np
import pytest
from PIL import Image

from rdeploy.data.images import collect
from rdeploy.data.preprocess import cut, normalise, prepare, prepare_each, shrink, to_pixels
from rdeploy.errors import ConfigError
from rdeploy.types import Preprocessing

IMAGENET = Preprocessing(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
HALF = Preprocessing(mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bilinear", crop_pct=1.0)


def noise(height, width, channels=3, seed=0):
    shape = (height, width, channels) if channels else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


SIZES = [(60, 90), (90, 60), (64, 64), (33, 200), (257, 130), (20, 24)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "lanczos", "nearest"])
@pytest.mark.parametrize("crop_pct", [0.875, 0.9, 1.0])
@pytest.mark.parametrize("resolution", [(64, 64), (48, 80), (80, 48)])
def test_same_pixels_as_timm(size, interpolation, crop_pct, resolution):
    data = pytest.importorskip("timm.data", reason="timm is not installed")
    image = Image.fromarray(noise(*size))
    preprocessing = Preprocessing(mean=(0,) * 3, std=(1,) * 3, interpolation=interpolation, crop_pct=crop_pct)
    transform = data.create_transform(
        input_size=resolution, interpolation=interpolation, crop_pct=crop_pct, crop_mode="center", normalize=False
    )

    ours = to_pixels(image, resolution, preprocessing)

    np.testing.assert_array_equal(ours, transform(image).permute(1, 2, 0).numpy())


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ["resnet50", "mobilenet_v2", "convnext_small", "swin_t", "efficientnet_b1"])
def test_same_input_as_torchvision(size, name):
    models = pytest.importorskip("torchvision.models", reason="torchvision is not installed")
    from rdeploy.models.torchvision import _facts

    weights = models.get_model_weights(name).DEFAULT
    facts = _facts(weights, name)
    preprocessing = Preprocessing(
        mean=facts.mean, std=facts.std, interpolation=facts.interpolation, crop_pct=facts.crop_pct
    )
    image = Image.fromarray(noise(*size))

    ours = normalise(to_pixels(image, facts.native_resolution, preprocessing)[None], preprocessing)

    np.testing.assert_array_equal(ours[0], weights.transforms()(image).numpy())


def test_normalise_is_pixels_over_255_minus_mean_over_std():
    pixels = np.array([[[[0, 128, 255]]]], dtype=np.uint8)

    result = normalise(pixels, HALF)

    assert result.shape == (1, 3, 1, 1)
    assert result.dtype == np.float32
    assert result.flags["C_CONTIGUOUS"]
    np.testing.assert_allclose(result.ravel(), [-1.0, 2 * 128 / 255 - 1, 1.0], atol=1e-6)


def test_normalise_wants_a_value_for_each_channel():
    with pytest.raises(ConfigError, match=r"images of 1 channels, but mean has 3 values and std 3: give one for each"):
        normalise(np.zeros((1, 2, 2, 1), np.uint8), IMAGENET)


def test_an_image_of_the_right_size_is_not_touched():
    array = noise(32, 32)

    assert (to_pixels(array, (32, 32), HALF) == array).all()


def test_float_arrays_are_0_to_1():
    array = noise(32, 32)

    assert (to_pixels(array.astype(np.float32) / 255, (32, 32), HALF) == array).all()


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.full((8, 8, 3), 2.0), "must lie in 0..1"),
        (np.full((8, 8, 3), np.nan), "must lie in 0..1"),
        (np.zeros((8, 8, 3), np.int64), "an image of int64: give uint8, or floating point in 0..1"),
        (np.zeros((1, 8, 8, 3), np.uint8), "is no image: give"),
        (np.zeros((0, 8, 3), np.uint8), "is no image: give"),
        (np.zeros((8, 8, 2), np.uint8), "the model takes 3 channels"),
    ],
)
def test_arrays_that_are_no_images(array, message):
    with pytest.raises(ConfigError, match=message):
        to_pixels(array, (8, 8), HALF)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "LA", "1"])
def test_modes_become_rgb_as_pillow_converts_them(mode):
    image = Image.fromarray(noise(16, 16)).convert(mode)

    ours = to_pixels(image, (16, 16), HALF)

    np.testing.assert_array_equal(ours, np.asarray(image.convert("RGB")))


def test_16_bit_grey_keeps_its_high_byte():
    image = Image.fromarray(np.array([[0, 256, 32768, 65535]], dtype=np.uint16))

    ours = to_pixels(image, (1, 4), Preprocessing(mean=(0,), std=(1,), crop_pct=1.0), channels=1)

    assert ours.ravel().tolist() == [0, 1, 128, 255]


def test_one_channel():
    array = noise(16, 16)

    assert to_pixels(array, (16, 16), HALF, channels=1).shape == (16, 16, 1)


def test_other_channels_are_resized_band_by_band():
    array = noise(32, 32, channels=5)

    ours = to_pixels(array, (16, 16), HALF, channels=5)

    first = to_pixels(array[:, :, 0], (16, 16), HALF, channels=1)
    np.testing.assert_array_equal(ours[:, :, :1], first)
    assert ours.shape == (16, 16, 5)


def test_a_photograph_for_a_model_of_other_channels():
    with pytest.raises(ConfigError, match=r"3 bands \(RGB\), but the model takes 5 channels: give arrays"):
        to_pixels(Image.fromarray(noise(8, 8)), (8, 8), HALF, channels=5)


def test_unknown_interpolation():
    preprocessing = Preprocessing(mean=(0,) * 3, std=(1,) * 3, interpolation="bicubik")

    with pytest.raises(ConfigError, match="unknown interpolation 'bicubik', did you mean 'bicubic'"):
        to_pixels(noise(8, 8), (4, 4), preprocessing)


def test_prepare_reads_all_in_order_with_progress(tmp_path):
    for index in range(5):
        Image.new("RGB", (20, 30), (index * 10, 0, 0)).save(tmp_path / f"{index}.png")
    seen = []

    pixels = prepare(collect(tmp_path), (16, 16), HALF, threads=2, progress=lambda *step: seen.append(step))

    assert pixels.shape == (5, 16, 16, 3)
    assert pixels[:, 8, 8, 0].tolist() == [0, 10, 20, 30, 40]
    assert seen == [(1, 5), (2, 5), (3, 5), (4, 5), (5, 5)]


def test_prepare_names_a_file_that_went_away(tmp_path):
    Image.new("RGB", (20, 30)).save(tmp_path / "a.png")
    images = collect(tmp_path)
    (tmp_path / "a.png").unlink()

    with pytest.raises(ConfigError, match=r"a\.png could not be read: no such file"):
        prepare(images, (16, 16), HALF)


def test_exif_orientation_is_ignored_as_timm_and_torchvision_do(tmp_path):
    array = noise(32, 32)
    exif = Image.Exif()
    exif[0x0112] = 3
    Image.fromarray(array).save(tmp_path / "turned.png", exif=exif)

    pixels = prepare(collect(tmp_path), (32, 32), HALF)

    np.testing.assert_array_equal(pixels[0], array)


def test_without_antialiasing_a_pixel_is_made_of_two_along_each_axis():
    row = np.arange(12, dtype=np.uint8)[None, :, None].repeat(3, axis=0).repeat(3, axis=2) * 20
    sharp = Preprocessing(mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bilinear", crop_pct=1.0, antialias=False)

    found = to_pixels(row, (1, 4), sharp)

    # A third of the size: the middle of each three pixels, exactly; of noise nothing is averaged away.
    assert found[0, :, 0].tolist() == [20, 80, 140, 200]


@pytest.mark.parametrize("size", [(64, 48), (61, 45), (40, 200)])
def test_without_antialiasing_it_is_pytorchs_own_resize(size):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    array = noise(*size)
    sharp = Preprocessing(
        mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bilinear", crop_pct=1.0, crop_mode="squash", antialias=False
    )
    exact = torch.nn.functional.interpolate(
        torch.from_numpy(array).permute(2, 0, 1)[None].float(), size=(24, 32), mode="bilinear", align_corners=False
    )[0].permute(1, 2, 0)

    found = to_pixels(array, (24, 32), sharp)

    assert np.abs(found.astype(np.float64) - exact.numpy()).max() <= 1.01  # 8 bits between the axes


def test_several_preprocessings_are_made_in_one_reading(tmp_path):
    for index in range(3):
        Image.fromarray(noise(50, 70, seed=index)).save(tmp_path / f"{index}.png")
    images = collect(tmp_path)
    wanted = [HALF, IMAGENET]

    found = prepare_each(images, (32, 32), wanted)

    for array, preprocessing in zip(found, wanted):
        np.testing.assert_array_equal(array, prepare(images, (32, 32), preprocessing))


def test_a_part_of_an_image_is_cut_out_and_resized_in_one_go():
    image = Image.fromarray(noise(60, 90))
    box = (10.5, 20.0, 50.5, 80.0)

    found = cut(image, box, (20, 30), HALF, channels=3)

    exact = image.resize((30, 20), Image.Resampling.BILINEAR, box=(20.0, 10.5, 80.0, 50.5))
    np.testing.assert_array_equal(found, np.asarray(exact))
    assert cut(noise(60, 90, 2), box, (20, 30), HALF, channels=2).shape == (20, 30, 2)


def test_all_of_a_picture_is_shrunk_by_the_filter_alone():
    pictures = np.stack([noise(40, 60, seed=index) for index in range(2)])

    found = shrink(pictures, (20, 30), IMAGENET)

    exact = Image.fromarray(pictures[1]).resize((30, 20), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(found[1], np.asarray(exact))
