"""Write scikit-learn's handwritten digits as folders of images for `dinat train` and `dinat evaluate`.

    python -m examples.digits_data FOLDER    # FOLDER/train, 23,000 images, and FOLDER/held-out, 360

Data: load_digits, 1,797 grayscale images of 8x8 (the test set of UCI's Optical Recognition of Handwritten Digits). Stratified
split with seed 0: 1,437 training images, 360 held-out images.
"""

import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

SEED = 0
SIZE = 64
VARIANTS = 16
"""Training images per digit."""


def split() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return training images (N, 8, 8) in 0..1, where ink is 1, and labels (N,), then held-out images and labels."""
    digits = load_digits()
    parts = train_test_split(digits.images / 16, digits.target, test_size=360, random_state=SEED, stratify=digits.target)
    return parts[0], parts[2], parts[1], parts[3]


def upscaled_image(gray: np.ndarray) -> Image.Image:
    """Convert an 8x8 digit in 0..1 to a 128x128 image, light ink on black."""
    return Image.fromarray((gray * 255).round().astype(np.uint8)).resize((128, 128), Image.Resampling.BICUBIC)


def uniform(count: int, low: float, high: float) -> Tensor:
    return torch.empty(count).uniform_(low, high)


def bernoulli(count: int, probability: float) -> Tensor:
    return torch.rand(count, 1, 1, 1) < probability


def augment(grays: Tensor, strength: float) -> Tensor:
    """Augment digits at random.

    Rotation, shear, scale and translation; soft or sharp edges and thin or thick strokes, as drawn by a mouse; light on dark or
    dark on light, in two contrasting colors; some noise.

    Args:
        grays: (B, 1, 8, 8) in 0..1.
        strength: Strength of all operations, in 0..1; 0 returns the plain digits.

    Returns:
        Pixel values (B, 3, SIZE, SIZE) in -1..1.
    """
    count = len(grays)
    angle = uniform(count, -0.3, 0.3) * strength
    shear = uniform(count, -0.25, 0.25) * strength
    scale_x = 1 + strength * uniform(count, -0.2, 1.2)
    scale_y = 1 + strength * uniform(count, -0.2, 1.0)
    shift_x = uniform(count, -0.5, 0.5) * (scale_x - 0.7).clamp(min=0.15) * strength
    shift_y = uniform(count, -0.5, 0.5) * (scale_y - 0.7).clamp(min=0.15) * strength
    cos, sin = angle.cos(), angle.sin()
    matrix = torch.stack(
        [
            torch.stack([scale_x * cos, scale_y * (shear * cos - sin), shift_x], dim=-1),
            torch.stack([scale_x * sin, scale_y * (shear * sin + cos), shift_y], dim=-1),
        ],
        dim=1,
    )
    grid = F.affine_grid(matrix, [count, 1, SIZE, SIZE], align_corners=False)
    ink = F.grid_sample(F.pad(grays, (4, 4, 4, 4)), grid * 0.5, mode="bicubic", align_corners=False).clamp(0, 1)
    edge, steepness = uniform(count, 0.35, 0.7).view(-1, 1, 1, 1), uniform(count, 6, 40).view(-1, 1, 1, 1)
    ink = torch.where(bernoulli(count, 0.6 * strength), torch.sigmoid((ink - edge) * steepness), ink)
    dark, light = uniform(3 * count, -1, -0.2).view(-1, 3, 1, 1), uniform(3 * count, 0.2, 1).view(-1, 3, 1, 1)
    gray = bernoulli(count, 0.7)
    dark, light = (torch.where(gray, color[:, :1].expand(-1, 3, -1, -1), color) for color in (dark, light))
    full = bernoulli(count, 1 - 0.5 * strength)
    dark, light = torch.where(full, -1.0, dark), torch.where(full, 1.0, light)
    inverted = bernoulli(count, 0.5 * strength)
    pixels = torch.where(inverted, light + (dark - light) * ink, dark + (light - dark) * ink)
    return (pixels + torch.randn_like(pixels) * 0.04 * strength * torch.rand(count, 1, 1, 1)).clamp(-1, 1)


def write(folder: Path) -> None:
    """Write train/LABEL/*.png, each digit with increasing augmentation strength from 0, and held-out/LABEL/*.png, plain."""
    torch.manual_seed(SEED)
    grays, labels, held_out, held_out_labels = split()
    for gray, label, number in zip(held_out, held_out_labels, range(len(held_out)), strict=True):
        _save(upscaled_image(gray), folder / "held-out" / str(label) / f"{number:04}.png")
    inputs = torch.from_numpy(grays).float()[:, None]
    for variant in range(VARIANTS):
        pixels = augment(inputs, variant / (VARIANTS - 1))
        images = ((pixels + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
        for number, (image, label) in enumerate(zip(images, labels, strict=True)):
            _save(Image.fromarray(image), folder / "train" / str(label) / f"{number:04}-{variant:02}.png")


def _save(image: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    write(Path(sys.argv[1]))
