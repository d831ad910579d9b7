"""Convert images to pixel values as specified by a checkpoint's preprocessor_config.json.

Images are resized as by Pillow. Results are those of ViTImageProcessor in transformers 4.53.3, bit-exact before normalization.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from dinat.model.capture_safe_cache import capture_safe_cache
from dinat.model.checkpoints.checkpoint import Checkpoint, open_checkpoint
from dinat.model.checkpoints.files import PROCESSOR, find_files
from dinat.model.cpu.resize import Pixels, resize_rgb
from dinat.model.errors import ImageError

ImageInput = Image.Image | npt.NDArray[np.uint8] | Tensor
"""A Pillow image of any mode; or a uint8 array (H, W), (H, W, 1) or (H, W, 3), or tensor (H, W), (1, H, W) or (3, H, W)."""


@dataclass(frozen=True)
class DinatImageProcessor:
    """Resize, crop, rescale and normalize images. The fields are those of preprocessor_config.json, and crop_pct.

    Attributes:
        do_resize: Whether to resize to `size`.
        size: {"height", "width"} in pixels, {"shortest_edge"} to keep the aspect ratio, or an int for height and width.
        resample: Pillow's filter number (2 bilinear, 3 bicubic).
        do_center_crop: Whether to crop to `crop_size`.
        crop_size: {"height", "width"} in pixels or an int; a smaller image is padded with zeros.
        crop_pct: If not None, use the transform of the original evaluation instead: resize the short side to size / crop_pct,
            then crop the center to size (see `original`).
        do_rescale: Whether to multiply by `rescale_factor`.
        rescale_factor: Factor for pixels in 0 to 255.
        do_normalize: Whether to normalize by `image_mean` and `image_std`.
        image_mean: Mean per channel, after rescaling.
        image_std: Standard deviation per channel, after rescaling.

    Raises:
        ImageError: A field is invalid.
    """

    do_resize: bool = True
    size: int | Mapping[str, int] = 224
    resample: int = 2
    do_center_crop: bool = False
    crop_size: int | Mapping[str, int] | None = None
    crop_pct: float | None = None
    do_rescale: bool = True
    rescale_factor: float = 1 / 255
    do_normalize: bool = True
    image_mean: Sequence[float] = (0.5, 0.5, 0.5)
    image_std: Sequence[float] = (0.5, 0.5, 0.5)

    def __post_init__(self) -> None:
        for name in ("image_mean", "image_std"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.do_resize:
            _size(self.size, "size", ({"height", "width"}, {"shortest_edge"}))
        if self.do_center_crop:
            _size(self.crop_size, "crop_size", ({"height", "width"},))
        if self.resample not in [int(filter) for filter in Image.Resampling]:
            raise ImageError(f"resample must be one of Pillow's filter numbers 0 to 5, got {self.resample!r}")
        if self.crop_pct is not None and not 0 < self.crop_pct <= 1:
            raise ImageError(f"crop_pct must be above 0 and at most 1, got {self.crop_pct}")
        if len(self.image_mean) != 3 or len(self.image_std) != 3 or 0 in self.image_std:
            raise ImageError(
                f"image_mean and image_std must be 3 numbers each, image_std without 0: got {self.image_mean}, {self.image_std}"
            )

    @classmethod
    def original(cls, size: int = 224, crop_pct: float = 0.875) -> "DinatImageProcessor":
        """Return the transform of the published accuracies: resize the short side (bicubic), then center crop.

        Args:
            size: Height and width in pixels.
            crop_pct: Size relative to the resized short side: 0.875 for the 224 models and 1.0 for the 384 models (evaluation
                of the original repository, by timm).
        """
        return cls(size=size, resample=3, crop_pct=crop_pct, image_mean=_IMAGENET_MEAN, image_std=_IMAGENET_STD)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "DinatImageProcessor":
        """Create an image processor from the contents of a preprocessor_config.json; unknown fields are ignored."""
        names = {field.name for field in fields(cls)}
        known = {name: value for name, value in values.items() if name in names and value is not None}
        return cls(**known)

    @classmethod
    def from_pretrained(cls, source: str | Path | Checkpoint, **options: Any) -> "DinatImageProcessor":
        """Create the image processor of a checkpoint.

        Without a preprocessor_config.json, this is the one of the published models, for the configuration's image_size or 224.

        Args:
            source: See find_files, or an open Checkpoint.
            options: Keyword arguments of find_files.

        Raises:
            CheckpointError: The checkpoint cannot be found or read.
            ImageError: A field is invalid.
        """
        if not isinstance(source, Checkpoint):
            values = find_files(source, **options).read_json(PROCESSOR)
            if values is not None:
                return cls.from_dict(values)
            source = open_checkpoint(source, **options)
        if source.processor is not None:
            return cls.from_dict(source.processor)
        size = getattr(source.config, "image_size", 224)
        return cls(size=size, resample=3, image_mean=_IMAGENET_MEAN, image_std=_IMAGENET_STD)

    def to_dict(self) -> dict[str, Any]:
        """Return the contents of preprocessor_config.json, readable by transformers."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        values |= {"image_mean": list(self.image_mean), "image_std": list(self.image_std)}
        return {k: v for k, v in values.items() if v is not None} | {"image_processor_type": "ViTImageProcessor"}

    def save_pretrained(self, folder: str | Path) -> None:
        """Write preprocessor_config.json into a folder, which is created if missing."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / PROCESSOR).write_text(json.dumps(self.to_dict(), indent=2) + "\n")

    @cached_property
    def output_size(self) -> tuple[int, int] | None:
        """(height, width) of all processed images in pixels; None if it depends on the image."""
        if self.do_center_crop and self.crop_pct is None:
            size = _size(self.crop_size, "crop_size", ({"height", "width"},))
        elif self.do_resize or self.crop_pct is not None:
            size = _size(self.size, "size", ({"height", "width"}, {"shortest_edge"}))
        else:
            return None
        return (size[0], size[1]) if len(size) == 2 else None

    def __call__(self, images: ImageInput | Sequence[ImageInput]) -> Tensor:
        """Convert one or several images to pixel values (B, 3, H, W) float32.

        Raises:
            ImageError: There are no images, an input is not an image, or the processed images differ in size (without
                do_resize).
        """
        batch: Sequence[ImageInput] = images if isinstance(images, Sequence) else [images]
        if not batch:
            raise ImageError("at least one image is required")
        pixels = [self.resize(image) for image in batch]
        sizes = {image.shape[:2] for image in pixels}
        if len(sizes) > 1:
            raise ImageError(f"images of one batch must have one size after processing, got {sorted(sizes)}: set do_resize")
        return self.normalize(torch.from_numpy(np.stack(pixels)))

    def resize(self, image: ImageInput) -> Pixels:
        """Convert an image to RGB, resize and crop it. Returns (H, W, 3) uint8."""
        rgb = to_rgb(image)
        if self.crop_pct is not None:
            height, width = _size(self.size, "size", ({"height", "width"},))
            resized_height, resized_width = _short_side(rgb, math.floor(height / self.crop_pct))
            pixels = resize_rgb(rgb, resized_width, resized_height, self.resample)
            return _center_crop(pixels, height, width, lambda margin: round(margin / 2))
        if self.do_resize:
            size = _size(self.size, "size", ({"height", "width"}, {"shortest_edge"}))
            if len(size) == 1:
                size = _short_side(rgb, size[0])
            pixels = resize_rgb(rgb, size[1], size[0], self.resample)
        else:
            pixels = np.asarray(rgb)
        if self.do_center_crop:
            height, width = _size(self.crop_size, "crop_size", ({"height", "width"},))
            pixels = _center_crop(pixels, height, width, lambda margin: margin // 2)
        return pixels

    def normalize(self, pixels: Tensor) -> Tensor:
        """Rescale and normalize: (B, H, W, 3) uint8 -> (B, 3, H, W) float32, with channels last in memory.

        The result of each of the 256 values per channel is computed once, in transformers' order and precision, and looked up.
        """
        table = _table(
            self.rescale_factor if self.do_rescale else None,
            (tuple(self.image_mean), tuple(self.image_std)) if self.do_normalize else None,
            pixels.device,
        )
        channels = [table[c].index_select(0, pixels[..., c].flatten().int()) for c in range(3)]
        return torch.stack(channels, dim=-1).view(pixels.shape).permute(0, 3, 1, 2)


@capture_safe_cache(64)
def _table(
    rescale: float | None, mean_and_std: tuple[tuple[float, ...], tuple[float, ...]] | None, device: torch.device
) -> Tensor:
    """Return the result of each value of each channel, (3, 256) float32. Cached per device: a CUDA graph cannot copy it."""
    values = np.arange(256, dtype=np.float64)
    if rescale is not None:
        values = values * rescale
    table = np.repeat(values.astype(np.float32)[None], 3, axis=0)
    if mean_and_std is not None:
        mean, std = (np.asarray(numbers, dtype=np.float32)[:, None] for numbers in mean_and_std)
        table = (table - mean) / std
    return torch.from_numpy(table).to(device)


_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)


def to_rgb(image: ImageInput) -> Image.Image:
    """Convert an image to RGB: transparent parts on white, and 16-bit grayscale scaled to 8 bits rather than clipped.

    Raises:
        ImageError: The input is not an image, or an array of another dtype or shape.
    """
    if isinstance(image, Tensor):
        image = image.permute(1, 2, 0).cpu().numpy() if image.dim() == 3 else image.cpu().numpy()
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] not in (1, 3)):
            raise ImageError(f"an array must be uint8, (H, W), (H, W, 1) or (H, W, 3), got {image.dtype} {image.shape}")
        image = Image.fromarray(image.squeeze(2) if image.ndim == 3 and image.shape[2] == 1 else image)
    if not isinstance(image, Image.Image):
        raise ImageError(f"an image must be a Pillow image, an array or a tensor, got {type(image).__name__}")
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I"):
        levels = np.asarray(image).astype(np.int64).clip(0, 65535)
        return Image.fromarray((levels // 257 if image.mode != "I" or levels.max() > 255 else levels).astype(np.uint8)).convert(
            "RGB"
        )
    if image.has_transparency_data:
        background = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(background, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


def _size(size: int | Mapping[str, int] | None, field: str, allowed: tuple[set[str], ...]) -> tuple[int, ...]:
    """Return (height, width) or (shortest_edge,). Raises ImageError unless the keys are one of the allowed sets."""
    sides = {"height": size, "width": size} if isinstance(size, int) else size
    if (
        not isinstance(sides, Mapping)
        or set(sides) not in allowed
        or not all(isinstance(side, int) and side > 0 for side in sides.values())
    ):
        forms = " or ".join("{" + ", ".join(sorted(names)) + "}" for names in allowed)
        raise ImageError(f"{field} must be a positive integer or {forms}, got {size!r}")
    return (sides["shortest_edge"],) if "shortest_edge" in sides else (sides["height"], sides["width"])


def _short_side(image: Image.Image, side: int) -> tuple[int, int]:
    """Return (height, width) with `side` pixels for the short side; the long side is proportional, rounded down."""
    width, height = image.size
    if width <= height:
        return max(1, int(side * height / width)), side
    return side, max(1, int(side * width / height))


def _center_crop(pixels: Pixels, height: int, width: int, half: Callable[[int], int]) -> Pixels:
    """Crop the center, after padding a smaller image with zeros. `half` returns half of a margin as an int."""
    rows, columns = max(0, height - pixels.shape[0]), max(0, width - pixels.shape[1])
    if rows or columns:
        pixels = np.pad(pixels, ((rows // 2, rows - rows // 2), (columns // 2, columns - columns // 2), (0, 0)))
    top, left = half(pixels.shape[0] - height), half(pixels.shape[1] - width)
    return pixels[top : top + height, left : left + width]
