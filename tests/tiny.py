"""Photographs and a model of 32 pixels, trained for two steps: enough where only the way through files counts."""

import numpy as np
from PIL import Image

from ddad.config import make_settings
from ddad.fit import fit

SHAPE = (32, 32)


def photo(seed, level=120):
    pixels = np.clip(level + 15 * np.random.default_rng(seed).standard_normal((*SHAPE, 3)), 0, 255)
    return pixels.astype(np.uint8)


def write_photos(folder, seeds, level=120):
    folder.mkdir(exist_ok=True)
    for i in seeds:
        Image.fromarray(photo(i, level)).save(folder / f"{i:03d}.png")
    return folder


def train_model(photos, folder, false_alarms=0.1, **changes):
    settings = make_settings(
        "xs",
        image_size=SHAPE[0],
        false_alarms=false_alarms,
        training={"batch_size": 2, "precision": "fp32"},
        adaptation={"epochs": 0},
        **changes,
    )
    return fit(photos, folder, settings, steps=2)
