"""Networks, weights and inputs of the parity cases, created with numpy only, so that they are equal on both sides."""

import zlib
from typing import Any

import numpy as np

PATTERNS = {"8421": [8, 4, 2, 1], "13631": [13, 6, 3, 1]}
INPUTS = [(224, 224), (160, 200), (64, 96), (33, 47)]
NETWORKS = {
    "k7-8421": (7, "8421", 0.0),
    "k7-13631-scaled": (7, "13631", 0.5),
    "k3-8421-scaled": (3, "8421", 0.5),
    "k5-13631": (5, "13631", 0.0),
    "k11-8421": (11, "8421", 0.0),
}
STAGES = ["stem", "stage1", "stage2", "stage3", "stage4"]
SAMPLE = 48
"""Elements stored of each tensor, in addition to its projection on a random vector, which depends on all elements."""


def config_fields(network: str) -> dict[str, Any]:
    """Arguments of DinatConfig for a small network of four stages with the published pattern of dilations."""
    kernel_size, pattern, layer_scale = NETWORKS[network]
    depths = [2, 2, 2, 1]
    return {
        "embed_dim": 16,
        "depths": depths,
        "num_heads": [1, 2, 4, 8],
        "kernel_size": kernel_size,
        "dilations": [[1, d][:depth] for d, depth in zip(PATTERNS[pattern], depths, strict=True)],
        "layer_scale_init_value": layer_scale,
        "num_labels": 10,
    }


def weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Random weights for a parameter, float64: norms around 1, large biases and RPB, and matrices that preserve the scale."""
    values = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)
    if name.endswith("rpb"):
        return values
    if "norm" in name:
        return values * 0.2 + (1.0 if name.endswith("weight") else 0.0)
    if name.endswith("layer_scale_parameters"):
        return values * 0.5
    if len(shape) > 1:
        return values * 1.5 / np.sqrt(np.prod(shape[1:]))
    return values * 0.5


def pixel_values(height: int, width: int, channels: int = 3) -> np.ndarray:
    """Two images: (2, channels, height, width) float64, standard normal."""
    return np.random.default_rng(height * 1000 + width).standard_normal((2, channels, height, width))


def fingerprint(values: np.ndarray) -> np.ndarray:
    """A sample of a tensor's elements, and its projection on a random unit vector: float64, at most SAMPLE + 1 values."""
    flat = np.asarray(values, dtype=np.float64).ravel()
    random = np.random.default_rng(flat.size)
    indices = random.choice(flat.size, min(SAMPLE, flat.size), replace=False)
    direction = random.standard_normal(flat.size)
    return np.append(flat[indices], flat @ direction / np.linalg.norm(direction))


def loss_cases() -> dict[str, tuple[dict[str, Any], np.ndarray]]:
    """Configuration fields and labels for each loss; problem_type is derived from the labels where possible."""
    random = np.random.default_rng(7)
    return {
        "single": ({"num_labels": 10}, np.array([3, -100])),
        "multi": ({"num_labels": 10}, random.integers(0, 2, (2, 10)).astype(np.float64)),
        "regression-1": ({"num_labels": 1}, random.standard_normal((2, 1))),
        "regression-10": ({"num_labels": 10, "problem_type": "regression"}, random.standard_normal((2, 10))),
    }


def synthetic_image(height: int, width: int) -> np.ndarray:
    """An image with edges, gradients and noise: (height, width, 3) uint8."""
    random = np.random.default_rng(height * 10_000 + width)
    y, x = np.mgrid[0:height, 0:width]
    values = np.stack([x * 255 / width, y * 255 / height, ((x // 7 + y // 5) % 2) * 255], axis=-1)
    return (values * 0.7 + random.integers(0, 77, (height, width, 3))).clip(0, 255).astype(np.uint8)


IMAGE_SIZES = [(375, 500), (500, 333), (64, 64), (17, 1000), (1, 1), (224, 224)]
PUBLISHED = {"resample": 3, "image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
PROCESSORS: dict[str, dict[str, Any]] = {
    "published-224": PUBLISHED | {"size": {"height": 224, "width": 224}},
    "published-384": PUBLISHED | {"size": 384},
    "defaults": {},
    "oblong": {"size": {"height": 96, "width": 160}, "resample": 0},
    "unresized": {"do_resize": False, "do_normalize": False},
    "unscaled": {"size": 48, "do_rescale": False, "do_normalize": False},
    "other-scale": {"size": 48, "rescale_factor": 1 / 127.5},
}
