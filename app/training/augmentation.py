"""Pictures that are never twice the same: cut out, mirrored, changed by one operation, mixed with each other.

On Pillow, which decodes them anyway: torchvision would do, but is one more binary that must fit PyTorch's.
"""

import math
from dataclasses import dataclass
from random import Random

import torch
import torch.nn.functional as F
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor

from dinat.app.training.recipe import Recipe
from dinat.model import DinatImageProcessor
from dinat.model.image_processor import to_rgb

ASPECT = (3 / 4, 4 / 3)
"""Width over height of what is cut out (Szegedy et al., arXiv 1409.4842)."""

LEVELS = 31
"""Strengths of an operation of TrivialAugment, 0 to 30."""


@dataclass(frozen=True)
class Augmentation:
    """What a recipe does to a picture before the network sees it, by chance that the caller's seed decides."""

    recipe: Recipe
    processor: DinatImageProcessor

    def __call__(self, picture: Image.Image, seed: str) -> Tensor:
        """(3, H, W) float32, normalised."""
        recipe, choose = self.recipe, Random(seed)
        assert self.processor.output_size is not None
        height, width = self.processor.output_size
        box = random_box(picture.size, recipe.area, choose)
        picture = to_rgb(picture).resize((width, height), Image.Resampling(self.processor.resample), box=box)
        if choose.random() < recipe.flip:
            picture = ImageOps.mirror(picture)
        if recipe.augment == "trivial":
            picture = trivial(picture, choose)
        pixels = self.processor.normalize(
            torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(1, height, width, 3)
        )[0]
        if choose.random() < recipe.erase:
            _erase(pixels, choose)
        return pixels


def random_box(size: tuple[int, int], smallest: float, choose: Random) -> tuple[int, int, int, int]:
    """(left, top, right, bottom), in pixels, of a part of a picture of this (width, height), at random.

    smallest: share of its area that the part has at least.
    """
    width, height = size
    for _ in range(10):
        area = width * height * choose.uniform(smallest, 1)
        aspect = math.exp(choose.uniform(*map(math.log, ASPECT)))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = choose.randint(0, width - w), choose.randint(0, height - h)
            return left, top, left + w, top + h
    return 0, 0, width, height


def trivial(picture: Image.Image, choose: Random) -> Image.Image:
    """One operation of TrivialAugment's wide set, and its strength, by chance (arXiv 2103.10158, table 2); grey where empty."""
    strength = choose.randrange(LEVELS) / (LEVELS - 1)
    signed = strength * choose.choice((-1, 1))

    def affine(*matrix: float) -> Image.Image:
        width, height = picture.size
        a, b, c, d, e, f = matrix
        x, y = width / 2, height / 2  # about the centre
        return picture.transform(
            picture.size,
            Image.Transform.AFFINE,
            (a, b, c + x - a * x - b * y, d, e, f + y - d * x - e * y),
            Image.Resampling.BILINEAR,
            fillcolor=(128, 128, 128),
        )

    match choose.choice(OPERATIONS):
        case "shear x":
            return affine(1, 0.99 * signed, 0, 0, 1, 0)
        case "shear y":
            return affine(1, 0, 0, 0.99 * signed, 1, 0)
        case "translate x":
            return affine(1, 0, 32 / 224 * picture.width * signed, 0, 1, 0)
        case "translate y":
            return affine(1, 0, 0, 0, 1, 32 / 224 * picture.height * signed)
        case "rotate":
            return picture.rotate(135 * signed, Image.Resampling.BILINEAR, fillcolor=(128, 128, 128))
        case "brightness":
            return ImageEnhance.Brightness(picture).enhance(1 + 0.99 * signed)
        case "colour":
            return ImageEnhance.Color(picture).enhance(1 + 0.99 * signed)
        case "contrast":
            return ImageEnhance.Contrast(picture).enhance(1 + 0.99 * signed)
        case "sharpness":
            return ImageEnhance.Sharpness(picture).enhance(1 + 0.99 * signed)
        case "posterize":
            return ImageOps.posterize(picture, 8 - round(6 * strength))
        case "solarize":
            return ImageOps.solarize(picture, 256 - round(256 * strength))
        case "autocontrast":
            return ImageOps.autocontrast(picture)
        case "equalize":
            return ImageOps.equalize(picture)
    return picture


OPERATIONS = (
    "identity",
    "shear x",
    "shear y",
    "translate x",
    "translate y",
    "rotate",
    "brightness",
    "colour",
    "contrast",
    "sharpness",
    "posterize",
    "solarize",
    "autocontrast",
    "equalize",
)


def targets(labels: Tensor, classes: int, smoothing: float) -> Tensor:
    """(B,) int classes -> (B, classes) float, what the network is to say."""
    return F.one_hot(labels, classes).float() * (1 - smoothing) + smoothing / classes


def mix(pixels: Tensor, wanted: Tensor, mixup: float, cutmix: float) -> tuple[Tensor, Tensor]:
    """Each picture of a batch and what is wanted of it, with another's mixed in; drawn from PyTorch's generator of the CPU.

    pixels: (B, 3, H, W).  wanted: (B, classes).  mixup, cutmix: alphas; with both, one of them at random.
    """
    if not mixup and not cutmix:
        return pixels, wanted
    cut = bool(cutmix) and (not mixup or bool(torch.rand(()) < 0.5))
    alpha = cutmix if cut else mixup
    mine = float(torch.distributions.Beta(alpha, alpha).sample())
    others = torch.randperm(len(pixels)).to(pixels.device)
    if not cut:
        pixels = pixels * mine + pixels[others] * (1 - mine)
    else:
        height, width = pixels.shape[-2:]
        side = math.sqrt(1 - mine)
        y, x = (int(torch.randint(extent, ())) for extent in (height, width))
        h, w = round(height * side / 2), round(width * side / 2)
        top, bottom, left, right = max(0, y - h), min(height, y + h), max(0, x - w), min(width, x + w)
        pixels = pixels.clone()
        pixels[..., top:bottom, left:right] = pixels[others][..., top:bottom, left:right]
        mine = 1 - (bottom - top) * (right - left) / (height * width)
    return pixels, wanted * mine + wanted[others] * (1 - mine)


def _erase(pixels: Tensor, choose: Random) -> None:
    """Write noise over a rectangle of 2 % to a third of the picture."""
    height, width = pixels.shape[-2:]
    area = height * width * choose.uniform(0.02, 1 / 3)
    aspect = math.exp(choose.uniform(math.log(0.3), math.log(1 / 0.3)))
    h, w = min(height, round(math.sqrt(area * aspect))), min(width, round(math.sqrt(area / aspect)))
    top, left = choose.randint(0, height - h), choose.randint(0, width - w)
    noise = torch.Generator().manual_seed(choose.getrandbits(63))
    pixels[:, top : top + h, left : left + w] = torch.randn(len(pixels), h, w, generator=noise)
