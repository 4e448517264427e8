"""Gather the demonstration's images from installed wheels: `python -m examples.images OUT`.

Twenty labelled ImageNet photographs come with foolbox (its code and dependencies are not needed: install it with
`pip install --no-deps foolbox==3.3.4`), a few colour photographs with scikit-image and scikit-learn.
`OUT/labelled.csv` lists path,label of the twenty; `OUT/calib` holds copies of all of them, unlabelled.
"""

from __future__ import annotations

import csv
import importlib.util
import re
import shutil
import sys
from pathlib import Path

_LABELLED = re.compile(r"imagenet_\d+_(\d+)\.jpg")
_PHOTOGRAPHS = {
    "foolbox": ("data", None),
    "skimage": ("data", ("astronaut.png", "chelsea.png", "coffee.png", "motorcycle_left.png", "rocket.jpg")),
    "sklearn": ("datasets/images", ("china.jpg", "flower.jpg")),
}


def package_folder(package: str) -> Path | None:
    """Return the folder of an installed package without importing it (foolbox's imports would need more packages)."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(next(iter(spec.submodule_search_locations)))


def photographs() -> list[tuple[Path, int | None]]:
    """Return (file, ImageNet class or None) of every photograph in the wheels that are installed."""
    found: list[tuple[Path, int | None]] = []
    for package, (folder, names) in _PHOTOGRAPHS.items():
        root = package_folder(package)
        if root is None:
            continue
        files = sorted((root / folder).glob("imagenet_*.jpg")) if names is None else [root / folder / n for n in names]
        for file in files:
            match = _LABELLED.fullmatch(file.name)
            if file.is_file():
                found.append((file, int(match.group(1)) if match else None))
    return found


def gather(out: Path) -> tuple[int, int]:
    """Copy the photographs to `out/calib`, write `out/labelled.csv`; return how many of either there are."""
    calib = out / "calib"
    calib.mkdir(parents=True, exist_ok=True)
    rows = []
    for file, label in (images := photographs()):
        shutil.copyfile(file, calib / file.name)
        if label is not None:
            rows.append((f"calib/{file.name}", label))
    with (out / "labelled.csv").open("w", newline="", encoding="utf-8") as file_out:
        writer = csv.writer(file_out, lineterminator="\n")
        writer.writerow(("path", "label"))
        writer.writerows(rows)
    return len(images), len(rows)


def main(arguments: list[str]) -> int:
    """Write to the folder that is named; return 3 when no package with photographs is installed."""
    if len(arguments) != 1:
        print("usage: python -m examples.images OUT", file=sys.stderr)
        return 2
    if not photographs():
        print(
            "no photographs: install them with `pip install scikit-image` and `pip install --no-deps foolbox==3.3.4`",
            file=sys.stderr,
        )
        return 3
    out = Path(arguments[0])
    total, labelled = gather(out)
    print(f"{total} photographs in {out / 'calib'}, {labelled} of them labelled in {out / 'labelled.csv'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
