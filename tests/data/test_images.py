import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rdeploy.data import decode
from rdeploy.data.images import collect
from rdeploy.errors import ConfigError


def picture(path, colour=(10, 20, 30), size=(24, 20)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


def photograph(path, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path)
    return path


def test_a_folder_is_searched_recursively_in_order(tmp_path):
    picture(tmp_path / "b.png")
    picture(tmp_path / "deep" / "a.jpg")
    picture(tmp_path / ".hidden" / "c.png")
    (tmp_path / "notes.txt").write_text("no image")

    images = collect(tmp_path)

    assert images.paths == (str(tmp_path / "b.png"), str(tmp_path / "deep" / "a.jpg"))
    assert images.labels is None
    assert images.skipped == ()


def test_class_folders_are_labels_in_sorted_order(tmp_path):
    for name in ("dog", "cat"):
        picture(tmp_path / name / "1.png")

    images = collect(tmp_path, labelled=True)

    assert images.labels == (0, 1)
    assert images.class_names == ("cat", "dog")


def test_class_folders_named_by_number_are_that_class(tmp_path):
    for name in ("10", "9"):
        picture(tmp_path / name / "1.png")

    assert collect(tmp_path, labelled=True).labels == (10, 9)


def test_class_folders_are_found_among_the_models_labels(tmp_path):
    for name in ("Tinca_tinca", "goldfish"):
        picture(tmp_path / name / "1.png")
    names = ("shark", "goldfish", "tench, Tinca tinca")

    images = collect(tmp_path, labelled=True, class_names=names)

    assert images.labels == (2, 1)
    assert images.class_names == names


def test_wordnet_folders_are_placed_by_timms_table(tmp_path):
    pytest.importorskip("timm", reason="timm is not installed")
    for name in ("n01443537", "n02123045"):
        picture(tmp_path / name / "1.png")

    images = collect(tmp_path, labelled=True, class_names=tuple(f"class {i}" for i in range(1000)))

    assert images.labels == (1, 281)


def test_wordnet_folders_without_timm(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    picture(tmp_path / "n01443537" / "1.png")

    with pytest.raises(ConfigError, match=r"WordNet id \(n01443537\), which only timm's table can place"):
        collect(tmp_path, labelled=True, class_names=tuple(f"class {i}" for i in range(1000)))


def test_class_folders_that_are_not_the_models_classes(tmp_path):
    for name in ("cat", "hors"):
        picture(tmp_path / name / "1.png")

    with pytest.raises(ConfigError, match="class 'hors' is not one of the model's 3 classes, did you mean 'horse'"):
        collect(tmp_path, labelled=True, class_names=("cat", "dog", "horse"))


def test_class_number_out_of_range(tmp_path):
    picture(tmp_path / "7" / "1.png")

    with pytest.raises(ConfigError, match="class 7 is out of range: the model has 3 classes, 0 to 2"):
        collect(tmp_path, labelled=True, class_names=("a", "b", "c"))


def test_calibration_does_not_mind_foreign_class_folders(tmp_path):
    picture(tmp_path / "anything" / "1.png")

    assert len(collect(tmp_path, class_names=("a", "b"))) == 1


def test_csv_with_and_without_header(tmp_path):
    picture(tmp_path / "x.png")
    picture(tmp_path / "y.png")
    (tmp_path / "plain.csv").write_text("x.png,3\ny.png,1\n")
    (tmp_path / "headed.csv").write_text("name,label,path\nfirst,3,x.png\nsecond,1,y.png\n")

    assert collect(tmp_path / "plain.csv", labelled=True).labels == (3, 1)
    assert collect(tmp_path / "headed.csv", labelled=True).labels == (3, 1)


@pytest.mark.parametrize("header", ["name,y", "fichier,etiquette", "filepath,id"])
def test_the_header_of_a_csv_is_no_image_and_no_class(header, tmp_path):
    for name in ("x.png", "y.png", "z.png"):
        picture(tmp_path / name)
    (tmp_path / "list.csv").write_text(f"{header}\nx.png,2\ny.png,10\nz.png,7\n")

    images = collect(tmp_path / "list.csv", labelled=True)

    assert (images.labels, images.skipped) == ((2, 10, 7), ())


def test_csv_without_labels_is_enough_to_calibrate(tmp_path):
    picture(tmp_path / "x.png")
    (tmp_path / "list.csv").write_text("x.png\n")

    assert collect(tmp_path / "list.csv").labels is None
    with pytest.raises(ConfigError, match=r"list\.csv has no labels: add a label column"):
        collect(tmp_path / "list.csv", labelled=True)


def test_a_folder_without_labels(tmp_path):
    picture(tmp_path / "x.png")

    with pytest.raises(ConfigError, match="has no labels: make one folder per class, or give a CSV of path,label"):
        collect(tmp_path, labelled=True)


def test_npy_and_npz(tmp_path):
    array = np.random.default_rng(0).integers(0, 256, (6, 8, 9, 3), dtype=np.uint8)
    np.save(tmp_path / "a.npy", array)
    np.savez(tmp_path / "a.npz", images=array, labels=np.arange(6))

    assert (collect(tmp_path / "a.npy").read(4) == array[4]).all()
    labelled = collect(tmp_path / "a.npz", labelled=True, limit=3, seed=1)
    assert len(labelled) == 3
    assert all((labelled.read(i) == array[label]).all() for i, label in enumerate(labelled.labels))


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((2, 8, 8, 3)), r"holds float64 of shape \(2, 8, 8, 3\): give uint8"),
        (np.zeros((2, 3, 32, 32), np.uint8), r"looks like \(N, C, H, W\)"),
        (np.zeros((8, 8), np.uint8), "give uint8 of shape"),
    ],
)
def test_arrays_of_the_wrong_kind(tmp_path, array, message):
    np.save(tmp_path / "a.npy", array)

    with pytest.raises(ConfigError, match=message):
        collect(tmp_path / "a.npy")


def test_npz_that_names_no_images(tmp_path):
    np.savez(tmp_path / "a.npz", weights=np.zeros(3))

    with pytest.raises(ConfigError, match="holds the arrays weights: name the images 'images'"):
        collect(tmp_path / "a.npz")


def test_npz_with_labels_of_another_length(tmp_path):
    np.savez(tmp_path / "a.npz", images=np.zeros((2, 4, 4, 3), np.uint8), labels=np.arange(3))

    with pytest.raises(ConfigError, match="labels must be 2 integers"):
        collect(tmp_path / "a.npz", labelled=True)


def test_npy_without_labels(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((2, 4, 4, 3), np.uint8))

    with pytest.raises(ConfigError, match="has no labels: give an .npz"):
        collect(tmp_path / "a.npy", labelled=True)


def test_a_pickled_npy_is_refused_unread(tmp_path):
    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "ran"),))

    np.save(tmp_path / "a.npy", np.array([Evil()], dtype=object), allow_pickle=True)

    with pytest.raises(ConfigError, match=r"a\.npy is not a readable NumPy file"):
        collect(tmp_path / "a.npy")
    assert not (tmp_path / "ran").exists()


def test_bad_files_among_good_ones_are_skipped_with_a_reason(tmp_path):
    good = photograph(tmp_path / "good.jpg")
    data = good.read_bytes()
    (tmp_path / "cut.jpg").write_bytes(data[: len(data) // 2])
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.jpeg").write_text("not an image")

    images = collect(tmp_path)

    assert [Path(p).name for p in images.paths] == ["good.jpg"]
    reasons = {Path(path).name: reason for path, reason in images.skipped}
    assert "truncated" in reasons["cut.jpg"]
    assert reasons["empty.png"] == "the file is empty"
    assert reasons["text.jpeg"] == "not an image that Pillow can open"


def test_bad_files_do_not_eat_into_the_number_asked_for(tmp_path):
    for index in range(8):
        picture(tmp_path / f"{index}.png")
        (tmp_path / f"bad{index}.png").write_bytes(b"no")

    images = collect(tmp_path, limit=6)

    assert len(images) == 6


def test_only_bad_files(tmp_path):
    (tmp_path / "a.png").write_bytes(b"")
    (tmp_path / "b.png").write_bytes(b"x")

    with pytest.raises(ConfigError, match=r"none of the 2 images of .* can be read; the first, .*a\.png: the file is"):
        collect(tmp_path)


def test_a_decompression_bomb_is_skipped(tmp_path, monkeypatch):
    picture(tmp_path / "small.png", size=(8, 8))
    picture(tmp_path / "bomb.png", size=(15, 10))
    picture(tmp_path / "worse.png", size=(50, 50))
    monkeypatch.setattr(decode.Image, "MAX_IMAGE_PIXELS", 100)

    images = collect(tmp_path)

    assert [Path(p).name for p in images.paths] == ["small.png"]
    assert all("too many pixels: more than 100" in reason for _, reason in images.skipped)


def test_a_loop_of_links_ends(tmp_path):
    picture(tmp_path / "a" / "x.png")
    (tmp_path / "a" / "loop").symlink_to(tmp_path, target_is_directory=True)

    assert len(collect(tmp_path)) == 1


def test_missing_files_of_a_csv_are_skipped(tmp_path):
    picture(tmp_path / "x.png")
    (tmp_path / "list.csv").write_text("x.png,0\ngone.png,1\n")

    images = collect(tmp_path / "list.csv")

    assert images.skipped == ((str(tmp_path / "gone.png"), "there is no such file"),)


def test_a_sample_is_seeded_and_keeps_the_order(tmp_path):
    for index in range(30):
        picture(tmp_path / f"{index:02}.png", (index, 0, 0))

    first, again, other = (collect(tmp_path, limit=10, seed=seed) for seed in (1, 1, 2))

    assert first.paths == again.paths
    assert list(first.paths) == sorted(first.paths)
    assert first.paths != other.paths
    assert first.sha256 == again.sha256 != other.sha256


def test_sha256_is_of_the_content_not_of_the_place(tmp_path):
    picture(tmp_path / "a" / "x.png")
    picture(tmp_path / "b" / "y.png")
    picture(tmp_path / "c" / "y.png", (0, 0, 0))

    here, there, other = (collect(tmp_path / name).sha256 for name in "abc")

    assert here == there != other


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gone", "does not exist: give a folder of images"),
        ("empty", "holds no file with an image suffix"),
        ("model.bin", "is not a folder, a CSV of path,label, or a"),
        ("empty.csv", "is empty: give one path,label a line"),
        ("binary.csv", "is not a readable UTF-8 CSV file"),
        ("broken.npz", "is not a readable NumPy file"),
    ],
)
def test_nothing_usable(tmp_path, name, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "model.bin").write_bytes(b"\0")
    (tmp_path / "empty.csv").write_text("\n")
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "broken.npz").write_bytes(b"PK\x03\x04broken")

    with pytest.raises(ConfigError, match=message):
        collect(tmp_path / name)


def test_a_limit_under_one(tmp_path):
    with pytest.raises(ConfigError, match="must be at least 1, not 0"):
        collect(tmp_path, limit=0)


def test_a_negative_label_of_an_array_file_is_no_class(tmp_path):
    np.savez(tmp_path / "x.npz", images=np.zeros((2, 8, 8, 3), np.uint8), labels=np.array([0, -1]))

    assert len(collect(tmp_path / "x.npz")) == 2
    with pytest.raises(ConfigError, match="label -1 is no class: they count from 0"):
        collect(tmp_path / "x.npz", labelled=True)
