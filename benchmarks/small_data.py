"""Accuracy on small real data: `dinat train` with its defaults, against a ResNet and a linear probe on the same images.

    python -m benchmarks.small_data [--data textures faces digits] [--json FILE]

The data come with Python packages (scikit-learn, scikit-image) and are written as DATA/train/LABEL and DATA/val/LABEL:

* textures: 8 classes, 45 training and 15 held-out crops of 64 pixels from different parts of one photograph per class
* faces: 2 classes, 150 and 50 images of 25 pixels, faces and other image parts of Labeled Faces in the Wild
* digits: 10 classes, 1,437 and 360 handwritten digits of 8 pixels, scaled to 32

`dinat train` is run as a user would: from the embedded digits checkpoint, and from random weights. The ResNet is timm's
resnet10t from random weights for the same epochs, with AdamW, cosine decay, random crops and flips, at three learning rates.
The linear probe is a logistic regression on the pooled features of the digits checkpoint. Accuracies are those of the best
and of the last epoch. Requires timm and scikit-image.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split

from benchmarks.timing import report
from dinat.app.evaluation.labelled_images import read_labelled_images
from dinat.app.training.augmentation import Augmentation
from dinat.app.training.recipe import Recipe
from dinat.model import DinatForImageClassification, DinatImageProcessor

SEED = 0
TEXTURES: dict[str, tuple[str, tuple[int, int, int, int]]] = {
    "brick": ("brick.png", (0, 0, 512, 512)),
    "grass": ("grass.png", (0, 0, 512, 512)),
    "gravel": ("gravel.png", (0, 0, 512, 512)),
    "moon": ("moon.png", (0, 0, 512, 512)),
    "stars": ("hubble_deep_field.jpg", (0, 0, 1000, 872)),
    "text": ("page.png", (0, 0, 384, 191)),
    "tissue": ("ihc.png", (0, 0, 512, 512)),
    "vessels": ("retina.jpg", (250, 300, 1150, 1100)),
}
"""File of skimage.data, and the area that is used: (left, top, right, bottom) in pixels."""
LEARNING_RATES = (1e-3, 3e-3, 1e-2)
"""Of the ResNet."""


def write_textures(folder: Path) -> None:
    """Write random crops: training images from the left 70 % of each photograph, held-out ones from the right 30 %."""
    import skimage

    rng = np.random.default_rng(SEED)
    for label, (name, area) in TEXTURES.items():
        with Image.open(Path(skimage.__file__).parent / "data" / name) as image:
            pixels = image.convert("L").crop(area)  # in color, the mean alone would identify the class
        border = int(pixels.width * 0.7)
        for part, count, left, right in (("train", 45, 0, border), ("val", 15, border, pixels.width)):
            for number in range(count):
                x, y = rng.integers(left, right - 64 + 1), rng.integers(0, pixels.height - 64 + 1)
                _save(pixels.crop((x, y, x + 64, y + 64)), folder / part / label / f"{number:03}.png")


def write_faces(folder: Path) -> None:
    import skimage

    images = np.load(Path(skimage.__file__).parent / "data" / "lfw_subset.npy")
    labels = np.repeat(["face", "other"], 100)
    _write_parts(folder, [Image.fromarray((image * 255).round().astype(np.uint8)) for image in images], labels, 50)


def write_digits(folder: Path) -> None:
    digits = load_digits()
    images = [Image.fromarray((image * (255 / 16)).round().astype(np.uint8)) for image in digits.images]
    _write_parts(folder, [image.resize((32, 32), Image.Resampling.BICUBIC) for image in images], digits.target, 360)


def _write_parts(folder: Path, images: list[Image.Image], labels: Any, held_out: int) -> None:
    """The split of digits is that of the embedded checkpoint, which has not seen the held-out images."""
    parts = train_test_split(range(len(images)), test_size=held_out, random_state=SEED, stratify=labels)
    for part, numbers in zip(("train", "val"), parts, strict=True):
        for number in numbers:
            _save(images[number], folder / part / str(labels[number]) / f"{number:04}.png")


def _save(image: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


DATA: dict[str, tuple[Callable[[Path], None], int]] = {
    "textures": (write_textures, 64),
    "faces": (write_faces, 32),
    "digits": (write_digits, 32),
}
"""Writer, and size of the input in pixels."""


def load(folder: Path, size: int) -> tuple[list[Image.Image], torch.Tensor, torch.Tensor]:
    """Return the images, their pixel values at `size`, and their classes."""
    dataset = read_labelled_images(folder)
    images = []
    for item in dataset.images:
        with Image.open(item.path) as image:
            images.append(image.convert("RGB"))
    labels = torch.tensor([dataset.labels.index(item.label) for item in dataset.images])
    return images, DinatImageProcessor(size=size)(images), labels


def train_resnet(folder: Path, size: int, epochs: int, learning_rate: float) -> tuple[float, float]:
    """Train timm's resnet10t from random weights. Returns the best and the last held-out accuracy."""
    import timm

    torch.manual_seed(SEED)
    images, _, labels = load(folder / "train", size)
    _, held_out, held_out_labels = load(folder / "val", size)
    augmentation = Augmentation(Recipe(augment="none"), DinatImageProcessor(size=size))
    network = timm.create_model("resnet10t", num_classes=int(labels.max()) + 1)
    optimizer = torch.optim.AdamW(network.parameters(), lr=learning_rate, weight_decay=0.05)
    steps = -(-len(images) // 32) * epochs
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.1)
    accuracies = []
    for epoch in range(epochs):
        network.train()
        for batch in torch.randperm(len(images)).split(32):
            pixels = torch.stack([augmentation(images[i], f"{epoch} {i}") for i in batch.tolist()])
            F.cross_entropy(network(pixels), labels[batch], label_smoothing=0.1).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        network.eval()
        with torch.inference_mode():
            accuracies.append(float((network(held_out).argmax(1) == held_out_labels).float().mean()))
    return max(accuracies), accuracies[-1]


def linear_probe(folder: Path) -> float:
    """Return the held-out accuracy of a logistic regression on the digits checkpoint's pooled features."""
    network = DinatForImageClassification.from_pretrained("digits")
    processor = DinatImageProcessor.from_pretrained("digits")
    features, labels = [], []
    for part in ("train", "val"):
        images, _, classes = load(folder / part, 64)
        with torch.inference_mode():
            features.append(
                torch.cat([network.classify(processor([image]), ["pooled"])[1]["pooled"] for image in images]).numpy()
            )
        labels.append(classes.numpy())
    mean, std = features[0].mean(0), features[0].std(0) + 1e-6
    classifier = LogisticRegression(max_iter=2000).fit((features[0] - mean) / std, labels[0])
    return float(classifier.score((features[1] - mean) / std, labels[1]))


def run_train(folder: Path, size: int, out: Path, *flags: str) -> dict[str, Any]:
    """Run `dinat train` with its defaults. Returns the epochs, the accuracies of the saved and of the last weights, and F1."""
    command = [sys.executable, "-m", "dinat", "train", str(folder), str(out), "--from", "digits", "--size", str(size), *flags]
    log = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    epochs = re.findall(r"^dinat: epoch .* top-1 ([\d.]+)%.* macro-F1 ([\d.]+)%", log, re.MULTILINE)
    best = max(float(top1) for top1, _ in epochs)
    return {"epochs": len(epochs), "best": best / 100, "last": float(epochs[-1][0]) / 100}


def measure(name: str, method: str, epochs: int | None) -> dict[str, Any]:
    """Return the accuracies of a method on a data set."""
    writer, size = DATA[name]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / name
        writer(folder)
        if method == "linear probe":
            accuracy = linear_probe(folder)
            return {"epochs": 0, "best": accuracy, "last": accuracy}
        if method.startswith("dinat"):
            flags = ("--weights", "random") if "random" in method else ()
            return run_train(folder, size, Path(temporary) / "out", *flags)
        if epochs is None:
            raise SystemExit(f"{method} requires --epochs, the number that dinat train has chosen")
        best, last = train_resnet(folder, size, epochs, float(method.split()[1]))
        return {"epochs": epochs, "best": best, "last": last}


METHODS = ("dinat train", "dinat train, random", *(f"resnet10t {rate:g}" for rate in LEARNING_RATES), "linear probe")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", choices=DATA, default=list(DATA))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--epochs", type=int, help="of the ResNet; by default those of dinat train")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows = []
    for name in arguments.data:
        epochs = arguments.epochs
        for method in arguments.methods:
            measured = measure(name, method, epochs)
            epochs = epochs or measured["epochs"] or None
            rows.append({"data": name, "method": method} | measured)
            print(json.dumps(rows[-1]), flush=True)
    report("Accuracy on held-out images of small data sets", rows, arguments.json)


if __name__ == "__main__":
    main()
