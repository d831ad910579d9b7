"""Train the embedded model: a small DiNAT on scikit-learn's handwritten digits, from one seed.

    python examples/train_digits.py train      # writes model/digits and examples/digits; about 15 minutes on 2 cores
    python examples/train_digits.py evaluate   # accuracy of a checkpoint on the held-out part, through its image processor

Data: scikit-learn's load_digits, 1,797 grey pictures of 8x8 (the test part of UCI's Optical Recognition of Handwritten
Digits). One stratified split, seed 0: 1,437 to train, 360 held out. The held-out part is looked at once, at the end: the
recipe below was fixed beforehand, and there is no choosing among checkpoints.
"""

import argparse
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from model import DinatConfig, DinatForImageClassification, DinatImageProcessor

ROOT = Path(__file__).resolve().parent.parent
SEED = 0
SIZE = 64
EPOCHS = 150
RAMP_EPOCHS = 50
"""Over which the augmentation grows to its full strength: from the start it would teach nothing."""
BATCH = 64
PEAK_LEARNING_RATE = 1.5e-3
EXAMPLES_PER_DIGIT = 2

CONFIG = DinatConfig(
    embed_dim=32,
    depths=[2, 2, 2],
    num_heads=[1, 2, 4],
    kernel_size=3,
    dilations=[[1, 4], [1, 2], [1, 1]],
    mlp_ratio=2.0,
    drop_path_rate=0.05,
    initializer_range=0.1,
    id2label={digit: str(digit) for digit in range(10)},
    image_size=SIZE,
)
PROCESSOR = DinatImageProcessor(size=SIZE, resample=3)


def split() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(N, 8, 8) greys in 0..1, ink is 1, and (N,) labels: to train, then held out."""
    digits = load_digits()
    parts = train_test_split(digits.images / 16, digits.target, test_size=360, random_state=SEED, stratify=digits.target)
    return parts[0], parts[2], parts[1], parts[3]


def picture(grey: np.ndarray) -> Image.Image:
    """An 8x8 digit as one would see it: light ink on black, 128x128."""
    return Image.fromarray((grey * 255).round().astype(np.uint8)).resize((128, 128), Image.Resampling.BICUBIC)


def uniform(count: int, low: float, high: float) -> Tensor:
    return torch.empty(count).uniform_(low, high)


def chosen(count: int, probability: float) -> Tensor:
    return torch.rand(count, 1, 1, 1) < probability


def augment(greys: Tensor, strength: float) -> Tensor:
    """(B, 1, 8, 8) greys in 0..1 -> (B, 3, SIZE, SIZE) pixel values in -1..1, never twice the same.

    Turned, sheared, stretched, shrunk and moved about; ink from soft to sharp-edged, thin to thick, as a mouse draws it; light
    on dark or dark on light, in two colours of some contrast; a little noise. strength: 0 for the plain digits, 1 for all that.
    """
    count = len(greys)
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
    ink = F.grid_sample(F.pad(greys, (4, 4, 4, 4)), grid * 0.5, mode="bicubic", align_corners=False).clamp(0, 1)
    edge, steepness = uniform(count, 0.35, 0.7).view(-1, 1, 1, 1), uniform(count, 6, 40).view(-1, 1, 1, 1)
    ink = torch.where(chosen(count, 0.6 * strength), torch.sigmoid((ink - edge) * steepness), ink)
    dark, light = uniform(3 * count, -1, -0.2).view(-1, 3, 1, 1), uniform(3 * count, 0.2, 1).view(-1, 3, 1, 1)
    grey = chosen(count, 0.7)
    dark, light = (torch.where(grey, colour[:, :1].expand(-1, 3, -1, -1), colour) for colour in (dark, light))
    full = chosen(count, 1 - 0.5 * strength)
    dark, light = torch.where(full, -1.0, dark), torch.where(full, 1.0, light)
    inverted = chosen(count, 0.5 * strength)
    pixels = torch.where(inverted, light + (dark - light) * ink, dark + (light - dark) * ink)
    return (pixels + torch.randn_like(pixels) * 0.04 * strength * torch.rand(count, 1, 1, 1)).clamp(-1, 1)


def train(folder: Path) -> None:
    torch.manual_seed(SEED)
    greys, labels, held_out, held_out_labels = split()
    inputs = torch.from_numpy(greys).float()[:, None]
    targets = torch.from_numpy(labels)
    network = DinatForImageClassification(CONFIG)
    print(f"{sum(p.numel() for p in network.parameters()):,} parameters, {len(inputs)} pictures to train", flush=True)
    average = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(0.998))
    optimizer = torch.optim.AdamW(network.parameters(), lr=PEAK_LEARNING_RATE, weight_decay=0.05)
    steps = EPOCHS * math.ceil(len(inputs) / BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_LEARNING_RATE, total_steps=steps, pct_start=0.1)
    network.train()
    started = time.perf_counter()
    for epoch in range(EPOCHS):
        losses = []
        strength = min(1.0, epoch / RAMP_EPOCHS)
        for batch in torch.randperm(len(inputs)).split(BATCH):
            logits = network(augment(inputs[batch], strength)).logits
            loss = F.cross_entropy(logits, targets[batch], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            average.update_parameters(network)
            losses.append(loss.item())
        print(f"epoch {epoch + 1}: loss {np.mean(losses):.4f}, {time.perf_counter() - started:.0f} s", flush=True)
    trained = average.module.eval()
    trained.save_pretrained(folder)
    PROCESSOR.save_pretrained(folder)
    examples = ROOT / "examples" / "digits"
    examples.mkdir(exist_ok=True)
    for digit in range(10):
        for n, index in enumerate(np.flatnonzero(held_out_labels == digit)[:EXAMPLES_PER_DIGIT], start=1):
            picture(held_out[index]).save(examples / f"{digit}-{n}.png")


def evaluate(source: str) -> float:
    """Share of the held-out digits that a checkpoint reads rightly, as a client would send them."""
    _, _, greys, labels = split()
    network, processor = DinatForImageClassification.from_pretrained(source), DinatImageProcessor.from_pretrained(source)
    with torch.inference_mode():
        predicted = network(processor([picture(grey) for grey in greys])).logits.argmax(dim=1).numpy()
    wrong = np.flatnonzero(predicted != labels)
    for index in wrong:
        print(f"held-out picture {index}: a {labels[index]} read as {predicted[index]}")
    accuracy = 1 - len(wrong) / len(labels)
    print(f"{len(labels) - len(wrong)} of {len(labels)} held-out digits right: {accuracy:.2%}")
    return accuracy


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["train", "evaluate"])
    parser.add_argument(
        "source", nargs="?", default=str(ROOT / "model" / "digits"), help="folder to write, or checkpoint to read"
    )
    arguments = parser.parse_args()
    if arguments.what == "train":
        train(Path(arguments.source))
    evaluate(arguments.source)
