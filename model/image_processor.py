"""Picture to tensor, exactly as a checkpoint's preprocessor_config.json says.

Resizing is Pillow's, as in transformers 4.53.3's ViTImageProcessor: equal to it bit for bit before normalising.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from dinat.model.capture_safe_cache import kept
from dinat.model.checkpoints.checkpoint import Checkpoint, open_checkpoint
from dinat.model.checkpoints.files import PROCESSOR, find_files
from dinat.model.cpu.resize import Pixels, resized
from dinat.model.errors import ImageError

Picture = Image.Image | npt.NDArray[np.uint8] | Tensor
"""A Pillow image of any mode, or uint8 as (H, W), (H, W, 1), (H, W, 3) array or (1, H, W), (3, H, W) tensor."""


@dataclass(frozen=True)
class DinatImageProcessor:
    """Resize, crop, rescale and normalise, each if its `do_` says so.

    size: {"height", "width"} in pixels for exactly that size, or {"shortest_edge"} to keep the aspect; an int is both a height
    and a width.  resample: Pillow's number (2 bilinear, 3 bicubic).  crop_size: {"height", "width"} or an int, cut from the
    centre, zeros where the picture is smaller.  crop_pct: the original evaluation's transform instead: the short side to
    size / crop_pct, then size cut from the centre (see `original`).  rescale_factor: what a pixel in 0..255 is multiplied by.
    image_mean, image_std: per channel, after rescaling.

    Raises ImageError (a ValueError) where a field makes no sense.
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
            raise ImageError(f"resample must be one of Pillow's numbers 0 to 5, got {self.resample!r}")
        if self.crop_pct is not None and not 0 < self.crop_pct <= 1:
            raise ImageError(f"crop_pct must be above 0 and at most 1, got {self.crop_pct}")
        if len(self.image_mean) != 3 or len(self.image_std) != 3 or 0 in self.image_std:
            raise ImageError(f"image_mean and image_std must be 3 numbers, no std 0: got {self.image_mean}, {self.image_std}")

    @classmethod
    def original(cls, size: int = 224, crop_pct: float = 0.875) -> "DinatImageProcessor":
        """The transform that the published accuracies were measured with: short side, bicubic, centre crop.

        crop_pct is 0.875 for the 224 models and 1.0 for the 384 ones (the original repository's evaluation, by timm).
        """
        return cls(size=size, resample=3, crop_pct=crop_pct, image_mean=_IMAGENET_MEAN, image_std=_IMAGENET_STD)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "DinatImageProcessor":
        """Read a preprocessor_config.json's fields; others, such as the processor's class, are left aside."""
        names = {field.name for field in fields(cls)}
        known = {name: value for name, value in values.items() if name in names and value is not None}
        return cls(**known)

    @classmethod
    def from_pretrained(cls, source: str | Path | Checkpoint, **where: Any) -> "DinatImageProcessor":
        """A checkpoint's processor; `source` and `where` as find_files takes them; or an open one.

        A checkpoint without preprocessor_config.json gets that of the published models, at its image_size or 224.
        """
        if not isinstance(source, Checkpoint):
            values = find_files(source, **where).read_json(PROCESSOR)
            if values is not None:
                return cls.from_dict(values)
            source = open_checkpoint(source, **where)
        if source.processor is not None:
            return cls.from_dict(source.processor)
        size = getattr(source.config, "image_size", 224)
        return cls(size=size, resample=3, image_mean=_IMAGENET_MEAN, image_std=_IMAGENET_STD)

    def to_dict(self) -> dict[str, Any]:
        """What preprocessor_config.json holds, readable by transformers."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        values |= {"image_mean": list(self.image_mean), "image_std": list(self.image_std)}
        return {k: v for k, v in values.items() if v is not None} | {"image_processor_type": "ViTImageProcessor"}

    def save_pretrained(self, folder: str | Path) -> None:
        """Write preprocessor_config.json into a folder, which is made where it is missing."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / PROCESSOR).write_text(json.dumps(self.to_dict(), indent=2) + "\n")

    @cached_property
    def output_size(self) -> tuple[int, int] | None:
        """(height, width) that every picture comes out at, in pixels; None where that depends on the picture."""
        if self.do_center_crop and self.crop_pct is None:
            size = _size(self.crop_size, "crop_size", ({"height", "width"},))
        elif self.do_resize or self.crop_pct is not None:
            size = _size(self.size, "size", ({"height", "width"}, {"shortest_edge"}))
        else:
            return None
        return (size[0], size[1]) if len(size) == 2 else None

    def __call__(self, images: Picture | Sequence[Picture]) -> Tensor:
        """One picture or several -> (B, 3, H, W) float32.

        Raises ImageError for an empty list, for what is no picture, and for pictures left at different sizes (do_resize off).
        """
        several: Sequence[Picture] = images if isinstance(images, Sequence) else [images]
        if not several:
            raise ImageError("no picture was given")
        pixels = [self.resize(image) for image in several]
        sizes = {image.shape[:2] for image in pixels}
        if len(sizes) > 1:
            raise ImageError(f"pictures of one batch must come out at one size, got {sorted(sizes)}: turn do_resize on")
        return self.normalize(torch.from_numpy(np.stack(pixels)))

    def resize(self, image: Picture) -> Pixels:
        """The picture as RGB, resized and cropped: (H, W, 3) uint8."""
        picture = to_rgb(image)
        if self.crop_pct is not None:
            height, width = _size(self.size, "size", ({"height", "width"},))
            between = _short_side(picture, math.floor(height / self.crop_pct))
            pixels = resized(picture, between[1], between[0], self.resample)
            return _center_crop(pixels, height, width, lambda gap: round(gap / 2))
        if self.do_resize:
            size = _size(self.size, "size", ({"height", "width"}, {"shortest_edge"}))
            if len(size) == 1:
                size = _short_side(picture, size[0])
            pixels = resized(picture, size[1], size[0], self.resample)
        else:
            pixels = np.asarray(picture)
        if self.do_center_crop:
            height, width = _size(self.crop_size, "crop_size", ({"height", "width"},))
            pixels = _center_crop(pixels, height, width, lambda gap: gap // 2)
        return pixels

    def normalize(self, pixels: Tensor) -> Tensor:
        """(B, H, W, 3) uint8 -> (B, 3, H, W) float32, rescaled and normalised, channels last in memory.

        Each channel has but 256 values: they are computed once, in transformers' order and precision, and looked up.
        """
        table = _table(
            self.rescale_factor if self.do_rescale else None,
            (tuple(self.image_mean), tuple(self.image_std)) if self.do_normalize else None,
            pixels.device,
        )
        channels = [table[c].index_select(0, pixels[..., c].flatten().int()) for c in range(3)]
        return torch.stack(channels, dim=-1).view(pixels.shape).permute(0, 3, 1, 2)


@kept(64)
def _table(
    rescale: float | None, mean_and_std: tuple[tuple[float, ...], tuple[float, ...]] | None, device: torch.device
) -> Tensor:
    """(3, 256) float32: what each value of each channel becomes. Kept on the device: a CUDA graph cannot copy it there."""
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


def to_rgb(image: Picture) -> Image.Image:
    """Any picture as an RGB image: transparent parts over white, 16-bit greys scaled down rather than cut off."""
    if isinstance(image, Tensor):
        image = image.permute(1, 2, 0).cpu().numpy() if image.dim() == 3 else image.cpu().numpy()
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] not in (1, 3)):
            raise ImageError(f"an array must be uint8, (H, W), (H, W, 1) or (H, W, 3), got {image.dtype} {image.shape}")
        image = Image.fromarray(image.squeeze(2) if image.ndim == 3 and image.shape[2] == 1 else image)
    if not isinstance(image, Image.Image):
        raise ImageError(f"a picture must be a Pillow image, an array or a tensor, got {type(image).__name__}")
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I"):
        levels = np.asarray(image).astype(np.int64).clip(0, 65535)
        return Image.fromarray((levels // 257 if image.mode != "I" or levels.max() > 255 else levels).astype(np.uint8)).convert(
            "RGB"
        )
    if image.has_transparency_data:
        opaque = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(opaque, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


def _size(size: int | Mapping[str, int] | None, field: str, allowed: tuple[set[str], ...]) -> tuple[int, ...]:
    """(height, width), or (shortest_edge,)."""
    sides = {"height": size, "width": size} if isinstance(size, int) else size
    if (
        not isinstance(sides, Mapping)
        or set(sides) not in allowed
        or not all(isinstance(side, int) and side > 0 for side in sides.values())
    ):
        forms = " or ".join("{" + ", ".join(sorted(names)) + "}" for names in allowed)
        raise ImageError(f"{field} must be a whole number of pixels or {forms}, got {size!r}")
    return (sides["shortest_edge"],) if "shortest_edge" in sides else (sides["height"], sides["width"])


def _short_side(picture: Image.Image, side: int) -> tuple[int, int]:
    """(height, width) with the short side at `side` pixels, the long one in proportion, rounded down."""
    width, height = picture.size
    if width <= height:
        return max(1, int(side * height / width)), side
    return side, max(1, int(side * width / height))


def _center_crop(pixels: Pixels, height: int, width: int, half: Any) -> Pixels:
    """Cut (height, width) from the centre; zeros around a picture that is smaller. `half` rounds half of what is left over."""
    below, right = max(0, height - pixels.shape[0]), max(0, width - pixels.shape[1])
    if below or right:
        pixels = np.pad(pixels, ((below // 2, below - below // 2), (right // 2, right - right // 2), (0, 0)))
    top, left = half(pixels.shape[0] - height), half(pixels.shape[1] - width)
    return pixels[top : top + height, left : left + width]
