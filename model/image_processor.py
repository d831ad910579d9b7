"""Convert images to pixel values as specified by a checkpoint's preprocessor_config.json.

Images are resized as by Pillow. Results are those of ViTImageProcessor in transformers 4.53.3, bit-exact before normalization.
PyTorch is imported where it is used: processes that only decode and resize images do not load it.
"""

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeGuard

import numpy as np
import numpy.typing as npt
from PIL import Image

from dinat.model.cpu.resize import Pixels, Window, resize_rgb, resize_rgb_window
from dinat.model.errors import ImageError
from dinat.model.field_rules import Rule, check_fields, flag, number, optional, sequence, shown
from dinat.model.writing import writing

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from dinat.model.checkpoints.checkpoint import Checkpoint

ImageInput: TypeAlias = "Image.Image | npt.NDArray[np.uint8] | Tensor"
"""A Pillow image of any mode; or a uint8 array (H, W), (H, W, 1) or (H, W, 3), or tensor (H, W), (1, H, W) or (3, H, W)."""


MAX_SIDE = 2**14
"""Largest height and width to resize to, in pixels."""

FIELD_RULES: dict[str, Rule] = {
    **dict.fromkeys(("do_resize", "do_center_crop", "do_rescale", "do_normalize"), flag),
    "crop_pct": optional(number(0.05, 1)),
    "rescale_factor": number(-1e6, 1e6),
    "image_mean": sequence(number(-1e6, 1e6), 3, 3),
    "image_std": sequence(number(-1e6, 1e6), 3, 3),
}
"""Types and ranges of the fields that are simple values."""


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
        check_fields(vars(self), FIELD_RULES, ImageError)
        for name in ("image_mean", "image_std"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.do_resize:
            _size(self.size, "size", ({"height", "width"}, {"shortest_edge"}))
        if self.do_center_crop:
            _size(self.crop_size, "crop_size", ({"height", "width"},))
        if self.resample not in [int(filter) for filter in Image.Resampling]:
            raise ImageError(f"resample must be one of Pillow's filter numbers 0 to 5, got {self.resample!r}")
        if 0 in self.image_std:
            raise ImageError(f"image_std must not contain 0, got {self.image_std}")

    @classmethod
    def original(cls, size: int = 224, crop_pct: float | None = None) -> "DinatImageProcessor":
        """Return the transform of the published accuracies: resize the short side (bicubic), then center crop.

        Args:
            size: Height and width in pixels.
            crop_pct: Size relative to the resized short side. If None, 0.875 below 384 pixels and 1.0 from there, as in the
                evaluation of the original repository, by timm.
        """
        if crop_pct is None:
            crop_pct = 1.0 if size >= 384 else 0.875
        return cls(size=size, resample=3, crop_pct=crop_pct, image_mean=_IMAGENET_MEAN, image_std=_IMAGENET_STD)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "DinatImageProcessor":
        """Create an image processor from the contents of a preprocessor_config.json; unknown fields are ignored."""
        names = {field.name for field in fields(cls)}
        known = {name: value for name, value in values.items() if name in names and value is not None}
        return cls(**known)

    @classmethod
    def from_pretrained(cls, source: "str | Path | Checkpoint", **options: Any) -> "DinatImageProcessor":
        """Create the image processor of a checkpoint.

        Without a preprocessor_config.json, this is the one of the published models, for the configuration's image_size or 224.

        Args:
            source: See find_files, or an open Checkpoint.
            options: Keyword arguments of find_files.

        Raises:
            CheckpointError: The checkpoint cannot be found or read.
            ImageError: A field is invalid.
        """
        from dinat.model.checkpoints.checkpoint import Checkpoint, open_checkpoint
        from dinat.model.checkpoints.files import PROCESSOR, find_files
        from dinat.model.config import image_size

        if not isinstance(source, Checkpoint):
            values = find_files(source, **options).read_json(PROCESSOR)
            if values is not None:
                return cls.from_dict(values)
            source = open_checkpoint(source, **options)
        if source.processor is not None:
            return cls.from_dict(source.processor)
        return cls(size=image_size(source.config), resample=3, image_mean=_IMAGENET_MEAN, image_std=_IMAGENET_STD)

    def to_dict(self) -> dict[str, Any]:
        """Return the contents of preprocessor_config.json, readable by transformers."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        values |= {"image_mean": list(self.image_mean), "image_std": list(self.image_std)}
        return {k: v for k, v in values.items() if v is not None} | {"image_processor_type": "ViTImageProcessor"}

    def save_pretrained(self, folder: str | Path) -> None:
        """Write preprocessor_config.json into a folder, which is created if missing."""
        from dinat.model.checkpoints.files import PROCESSOR

        Path(folder).mkdir(parents=True, exist_ok=True)
        with writing(Path(folder) / PROCESSOR):
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

    def __call__(self, images: "ImageInput | Sequence[ImageInput]") -> "Tensor":
        """Convert one or several images to pixel values (B, 3, H, W) float32.

        Raises:
            ImageError: There are no images, an input is not an image, or the processed images differ in size (without
                do_resize).
        """
        import torch

        batch: Sequence[ImageInput] = images if isinstance(images, Sequence) else [images]
        if not batch:
            raise ImageError("at least one image is required")
        pixels = [self.resize(image) for image in batch]
        sizes = {image.shape[:2] for image in pixels}
        if len(sizes) > 1:
            raise ImageError(f"images of one batch must have one size after processing, got {sorted(sizes)}: set do_resize")
        return self.normalize(torch.from_numpy(np.stack(pixels)))

    def resize(self, image: ImageInput) -> Pixels:
        """Convert an image to RGB, resize and crop it. Returns (H, W, 3) uint8.

        Raises:
            ImageError: The input is not an image; or its aspect ratio is extreme, and Pillow's filter is neither bilinear nor
                bicubic.
        """
        rgb = to_rgb(image)
        height, width = self._resized_size(rgb.width, rgb.height)
        crop_size = self._crop_size
        if crop_size is None:
            return resize_rgb(rgb, width, height, self.resample)
        rows, columns = (self._crop(size, crop) for size, crop in zip((height, width), crop_size, strict=True))
        window = Window(rows.first, rows.last, columns.first, columns.last)
        pixels = resize_rgb_window(rgb, width, height, self.resample, window)
        if pixels.shape[:2] == crop_size:
            return pixels
        padded = np.zeros((*crop_size, 3), dtype=np.uint8)
        padded[rows.before :, columns.before :][: pixels.shape[0], : pixels.shape[1]] = pixels
        return padded

    def processed_size(self, width: int, height: int) -> tuple[int, int]:
        """Return (height, width) of the processed image, for an RGB image of this width and height."""
        return self.output_size or self._resized_size(width, height)

    def _resized_size(self, width: int, height: int) -> tuple[int, int]:
        """Return (height, width) before cropping."""
        if self.crop_pct is not None:
            return _short_side(width, height, math.floor(_size(self.size, "size", ({"height", "width"},))[0] / self.crop_pct))
        if not self.do_resize:
            return height, width
        size = _size(self.size, "size", ({"height", "width"}, {"shortest_edge"}))
        return (size[0], size[1]) if len(size) == 2 else _short_side(width, height, size[0])

    @property
    def _crop_size(self) -> tuple[int, ...] | None:
        """(height, width) of the crop, or None."""
        if self.crop_pct is not None:
            return _size(self.size, "size", ({"height", "width"},))
        return _size(self.crop_size, "crop_size", ({"height", "width"},)) if self.do_center_crop else None

    def _crop(self, size: int, crop_size: int) -> "_Crop":
        """Return the center of an axis, which is padded with zeros if it is smaller."""
        before = max(0, crop_size - size) // 2
        margin = max(0, size - crop_size)
        first = round(margin / 2) if self.crop_pct is not None else margin // 2
        return _Crop(before, first, min(size, first + crop_size))

    def normalize(self, pixels: "Tensor", dtype: "torch.dtype | None" = None) -> "Tensor":
        """Rescale and normalize: (B, H, W, 3) uint8 -> (B, 3, H, W), with channels last in memory; float32 if dtype is None."""
        import torch

        from dinat.model.normalization import normalize

        return normalize(
            pixels,
            self.rescale_factor if self.do_rescale else None,
            (tuple(self.image_mean), tuple(self.image_std)) if self.do_normalize else None,
            dtype or torch.float32,
        )


@dataclass(frozen=True)
class _Crop:
    """Pixels `first` to before `last` of an axis, after `before` pixels of zeros."""

    before: int
    first: int
    last: int


_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)

_BAND_PIXELS = 2**20
"""Pixels that are converted at a time."""


def to_rgb(image: ImageInput) -> Image.Image:
    """Convert an image to RGB: transparent parts on white, and 16-bit grayscale scaled to 8 bits rather than clipped.

    Raises:
        ImageError: The input is not an image, or an array of another dtype or shape.
    """
    if _is_tensor(image):
        image = image.permute(1, 2, 0).cpu().numpy() if image.dim() == 3 else image.cpu().numpy()
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] not in (1, 3)):
            raise ImageError(f"an array must be uint8, (H, W), (H, W, 1) or (H, W, 3), got {image.dtype} {image.shape}")
        if not image.size:
            raise ImageError(f"an image must have at least one pixel, got {image.shape}")
        image = Image.fromarray(image.squeeze(2) if image.ndim == 3 and image.shape[2] == 1 else image)
    if not isinstance(image, Image.Image):
        raise ImageError(f"an image must be a Pillow image, an array or a tensor, got {type(image).__name__}")
    if 0 in image.size:
        raise ImageError(f"an image must have at least one pixel, got {image.width}x{image.height}")
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode == "La":  # premultiplied; Pillow converts it to LA only
        image = image.convert("LA")
    if image.mode.startswith("I"):
        return _scaled_to_8_bits(image).convert("RGB")
    return _on_white(image) if image.has_transparency_data else image.convert("RGB")


def _scaled_to_8_bits(image: Image.Image) -> Image.Image:
    """Scale 16-bit grayscale to 8 bits, with the transparent level as white."""
    samples = np.asarray(image)
    clipped = samples.clip(0, 65535) if image.mode == "I" else samples
    levels = (clipped // 257 if image.mode != "I" or clipped.max() > 255 else clipped).astype(np.uint8)
    transparent = image.info.get("transparency")  # of a PNG; Pillow ignores it in these modes
    if transparent is not None:
        levels[samples == transparent] = 255
    return Image.fromarray(levels)


def _is_tensor(image: object) -> "TypeGuard[Tensor]":
    torch = sys.modules.get("torch")  # not imported: if it is not loaded, no tensor exists
    return torch is not None and isinstance(image, torch.Tensor)


def _on_white(image: Image.Image) -> Image.Image:
    """Draw an image on white, in bands of rows, whose copies require less memory than those of the whole image."""
    rgb = Image.new("RGB", image.size)
    rows = max(1, _BAND_PIXELS // image.width)
    for top in range(0, image.height, rows):
        band = image.crop((0, top, image.width, min(image.height, top + rows))).convert("RGBA")
        rgb.paste(Image.alpha_composite(Image.new("RGBA", band.size, "white"), band).convert("RGB"), (0, top))
    return rgb


def _size(size: int | Mapping[str, int] | None, field: str, allowed: tuple[set[str], ...]) -> tuple[int, ...]:
    """Return (height, width) or (shortest_edge,). Raises ImageError unless the keys are one of the allowed sets."""
    sides = {"height": size, "width": size} if isinstance(size, int) else size
    if (
        not isinstance(sides, Mapping)
        or set(sides) not in allowed
        or not all(isinstance(side, int) and not isinstance(side, bool) and 0 < side <= MAX_SIDE for side in sides.values())
    ):
        forms = " or ".join("{" + ", ".join(sorted(names)) + "}" for names in allowed)
        raise ImageError(f"{field} must be an integer from 1 to {MAX_SIDE:,} or {forms}, got {shown(size)}")
    return (sides["shortest_edge"],) if "shortest_edge" in sides else (sides["height"], sides["width"])


def _short_side(width: int, height: int, side: int) -> tuple[int, int]:
    """Return (height, width) with `side` pixels for the short side; the long side is proportional, rounded down."""
    if width <= height:
        return max(1, int(side * height / width)), side
    return side, max(1, int(side * width / height))
