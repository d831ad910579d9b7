"""Random augmentation of training images: crop, flip, TrivialAugment, random erasing, mixup and CutMix.

Implemented with Pillow, which also decodes the images. torchvision would add a binary that must match PyTorch's version.
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
"""Range of the aspect ratio (width over height) of random crops (Szegedy et al., arXiv 1409.4842)."""

LEVELS = 31
"""Number of strengths of a TrivialAugment operation, 0 to 30."""


@dataclass(frozen=True)
class Augmentation:
    """Randomly augments and preprocesses an image.

    Attributes:
        recipe: Probabilities and strengths.
        processor: Image processor with a fixed output size.
    """

    recipe: Recipe
    processor: DinatImageProcessor

    def __call__(self, image: Image.Image, seed: str) -> Tensor:
        """Return the normalized pixel values, (3, H, W) float32. The result depends only on the image and the seed."""
        recipe, rng = self.recipe, Random(seed)
        assert self.processor.output_size is not None
        height, width = self.processor.output_size
        box = random_box(image.size, recipe.area, rng)
        image = to_rgb(image).resize((width, height), Image.Resampling(self.processor.resample), box=box)
        if rng.random() < recipe.flip:
            image = ImageOps.mirror(image)
        if recipe.augment == "trivial":
            image = trivial_augment(image, rng)
        pixels = self.processor.normalize(
            torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(1, height, width, 3)
        )[0]
        if rng.random() < recipe.erase:
            _erase(pixels, rng)
        return pixels


def random_box(size: tuple[int, int], min_area: float, rng: Random) -> tuple[int, int, int, int]:
    """Choose a random crop.

    Args:
        size: (width, height) of the image in pixels.
        min_area: Minimum area of the crop as a fraction of the image, in 0..1.
        rng: Random number generator.

    Returns:
        (left, top, right, bottom) in pixels; the whole image if ten random crops do not fit.
    """
    width, height = size
    for _ in range(10):
        area = width * height * rng.uniform(min_area, 1)
        aspect = math.exp(rng.uniform(*map(math.log, ASPECT)))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = rng.randint(0, width - w), rng.randint(0, height - h)
            return left, top, left + w, top + h
    return 0, 0, width, height


def trivial_augment(image: Image.Image, rng: Random) -> Image.Image:
    """Apply a random operation of TrivialAugment's wide set with a random strength (arXiv 2103.10158, table 2).

    Pixels outside the image are gray.
    """
    strength = rng.randrange(LEVELS) / (LEVELS - 1)
    signed = strength * rng.choice((-1, 1))

    def affine(*matrix: float) -> Image.Image:
        width, height = image.size
        a, b, c, d, e, f = matrix
        x, y = width / 2, height / 2  # the center stays fixed
        return image.transform(
            image.size,
            Image.Transform.AFFINE,
            (a, b, c + x - a * x - b * y, d, e, f + y - d * x - e * y),
            Image.Resampling.BILINEAR,
            fillcolor=(128, 128, 128),
        )

    match rng.choice(OPERATIONS):
        case "shear x":
            return affine(1, 0.99 * signed, 0, 0, 1, 0)
        case "shear y":
            return affine(1, 0, 0, 0.99 * signed, 1, 0)
        case "translate x":
            return affine(1, 0, 32 / 224 * image.width * signed, 0, 1, 0)
        case "translate y":
            return affine(1, 0, 0, 0, 1, 32 / 224 * image.height * signed)
        case "rotate":
            return image.rotate(135 * signed, Image.Resampling.BILINEAR, fillcolor=(128, 128, 128))
        case "brightness":
            return ImageEnhance.Brightness(image).enhance(1 + 0.99 * signed)
        case "color":
            return ImageEnhance.Color(image).enhance(1 + 0.99 * signed)
        case "contrast":
            return ImageEnhance.Contrast(image).enhance(1 + 0.99 * signed)
        case "sharpness":
            return ImageEnhance.Sharpness(image).enhance(1 + 0.99 * signed)
        case "posterize":
            return ImageOps.posterize(image, 8 - round(6 * strength))
        case "solarize":
            return ImageOps.solarize(image, 256 - round(256 * strength))
        case "autocontrast":
            return ImageOps.autocontrast(image)
        case "equalize":
            return ImageOps.equalize(image)
    return image


OPERATIONS = (
    "identity",
    "shear x",
    "shear y",
    "translate x",
    "translate y",
    "rotate",
    "brightness",
    "color",
    "contrast",
    "sharpness",
    "posterize",
    "solarize",
    "autocontrast",
    "equalize",
)


def soft_labels(labels: Tensor, num_classes: int, smoothing: float) -> Tensor:
    """Convert class indices (B,) to one-hot labels with label smoothing, (B, num_classes) float."""
    return F.one_hot(labels, num_classes).float() * (1 - smoothing) + smoothing / num_classes


def mix(pixels: Tensor, targets: Tensor, mixup: float, cutmix: float) -> tuple[Tensor, Tensor]:
    """Mix each image of a batch with another one, by mixup or CutMix, and the targets in the same proportion.

    Random numbers are drawn from PyTorch's default CPU generator.

    Args:
        pixels: (B, 3, H, W).
        targets: (B, num_classes).
        mixup: Alpha of mixup (arXiv 1710.09412); 0 disables it.
        cutmix: Alpha of CutMix (arXiv 1905.04899); 0 disables it. If both are enabled, one is chosen at random.

    Returns:
        Mixed pixels and targets, of the same shapes.
    """
    if not mixup and not cutmix:
        return pixels, targets
    use_cutmix = bool(cutmix) and (not mixup or bool(torch.rand(()) < 0.5))
    alpha = cutmix if use_cutmix else mixup
    weight = float(torch.distributions.Beta(alpha, alpha).sample())
    permutation = torch.randperm(len(pixels)).to(pixels.device)
    if not use_cutmix:
        pixels = pixels * weight + pixels[permutation] * (1 - weight)
    else:
        height, width = pixels.shape[-2:]
        side = math.sqrt(1 - weight)
        y, x = (int(torch.randint(extent, ())) for extent in (height, width))
        h, w = round(height * side / 2), round(width * side / 2)
        top, bottom, left, right = max(0, y - h), min(height, y + h), max(0, x - w), min(width, x + w)
        pixels = pixels.clone()
        pixels[..., top:bottom, left:right] = pixels[permutation][..., top:bottom, left:right]
        weight = 1 - (bottom - top) * (right - left) / (height * width)
    return pixels, targets * weight + targets[permutation] * (1 - weight)


def _erase(pixels: Tensor, rng: Random) -> None:
    """Replace a random rectangle, 2 % to a third of the image, by noise, in place."""
    height, width = pixels.shape[-2:]
    area = height * width * rng.uniform(0.02, 1 / 3)
    aspect = math.exp(rng.uniform(math.log(0.3), math.log(1 / 0.3)))
    h, w = min(height, round(math.sqrt(area * aspect))), min(width, round(math.sqrt(area / aspect)))
    top, left = rng.randint(0, height - h), rng.randint(0, width - w)
    noise = torch.Generator().manual_seed(rng.getrandbits(63))
    pixels[:, top : top + h, left : left + w] = torch.randn(len(pixels), h, w, generator=noise)
