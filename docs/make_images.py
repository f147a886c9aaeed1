"""Draw the documentation's figures: the study's, from its saved histories, in few colours.

Usage: python docs/make_images.py STUDY, where STUDY is the folder that the study wrote.
"""

import sys
from pathlib import Path

from PIL import Image

IMAGES = Path(__file__).parent / "images"
NAMES = {
    "1_activations": "activations",
    "2_octaves": "octaves",
    "2_ridge": "ridge",
    "3_loss": "loss",
    "4_mean": "mean",
    "5_magnitude": "magnitude",
    "5_log2": "log2",
}
COLORS = 96


def main(study: Path) -> None:
    for source, target in NAMES.items():
        with Image.open(study / f"{source}.png") as image:
            small = image.convert("RGB").quantize(COLORS, dither=Image.Dither.NONE)
            small.save(IMAGES / f"{target}.png", optimize=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
