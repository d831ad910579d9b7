"""Accuracy of the embedded checkpoint."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from dinat.model import DinatForImageClassification, DinatImageProcessor
from examples.digits_data import split, upscaled_image

EXAMPLES = sorted((Path(__file__).parents[2] / "examples" / "digits").glob("*.png"))

STROKES = {
    0: [(50, 20), (25, 35), (22, 60), (35, 85), (55, 88), (75, 75), (78, 45), (65, 22), (50, 20)],
    1: [(38, 32), (52, 15), (52, 85)],
    2: [(25, 32), (40, 16), (62, 18), (70, 36), (55, 55), (25, 84), (75, 84)],
    3: [(28, 20), (65, 18), (68, 36), (45, 46), (70, 58), (70, 78), (45, 88), (25, 78)],
    4: [(62, 86), (62, 15), (22, 62), (80, 62)],
    5: [(70, 16), (32, 16), (30, 46), (58, 44), (72, 60), (65, 82), (28, 84)],
    6: [(65, 14), (40, 32), (28, 60), (38, 84), (62, 84), (70, 66), (55, 54), (30, 62)],
    7: [(22, 18), (75, 18), (45, 86)],
    8: [(50, 48), (30, 34), (40, 16), (60, 16), (70, 32), (50, 48), (28, 66), (36, 86), (64, 86), (72, 66), (50, 48)],
    9: [(70, 36), (55, 50), (32, 42), (32, 22), (52, 14), (70, 26), (70, 36), (62, 86)],
}


@pytest.fixture(scope="module")
def network() -> DinatForImageClassification:
    return DinatForImageClassification.from_pretrained("digits")


def predict(network: DinatForImageClassification, images: list[Image.Image]) -> list[int]:
    with torch.inference_mode():
        return network(DinatImageProcessor.from_pretrained("digits")(images)).logits.argmax(dim=1).tolist()


def test_held_out_accuracy(network: DinatForImageClassification) -> None:
    training, _, held_out, labels = split()
    assert (len(training), len(held_out)) == (1437, 360)
    assert np.mean(np.equal(predict(network, [upscaled_image(gray) for gray in held_out]), labels)) >= 0.985


def test_example_images_are_classified_correctly(network: DinatForImageClassification) -> None:
    assert len(EXAMPLES) == 20
    assert predict(network, [Image.open(path) for path in EXAMPLES]) == [int(path.name[0]) for path in EXAMPLES]


@pytest.mark.parametrize(("paper", "ink"), [("white", "black"), ("black", "white"), ("#fdf6e3", "#268bd2")])
@pytest.mark.parametrize("width", [11, 22])
def test_drawn_digits_are_classified(network: DinatForImageClassification, paper: str, ink: str, width: int) -> None:
    images = []
    for digit in range(10):
        image = Image.new("RGB", (280, 280), paper)
        points = [(x * 2.8, y * 2.8) for x, y in STROKES[digit]]
        ImageDraw.Draw(image).line(points, fill=ink, width=width, joint="curve")
        images.append(image)
    assert sum(digit == predicted for digit, predicted in enumerate(predict(network, images))) >= 9


@pytest.mark.parametrize(("attention", "count"), [("tiled", 360), ("natten", 40), ("triton", 2)])
@pytest.mark.filterwarnings("ignore:.*flex_attention:UserWarning", "ignore:return_lse is deprecated:FutureWarning")
def test_every_attention_backend_in_bf16_matches_float32(
    network: DinatForImageClassification, attention: str, count: int
) -> None:
    if attention != "tiled":
        pytest.importorskip(attention, reason=f"{attention} is not installed")
    half = DinatForImageClassification.from_pretrained("digits", attention=attention, dtype=torch.bfloat16)
    images = [Image.fromarray(np.asarray(gray)) for gray in split()[2][:count]]
    pixels = DinatImageProcessor.from_pretrained("digits")(images)
    with torch.inference_mode():
        expected, logits = network(pixels).logits, half.classify(pixels.bfloat16())[0]
    assert len(images) == count
    assert logits.dtype == torch.float32
    assert logits.argmax(1).tolist() == expected.argmax(1).tolist()
    assert (logits - expected).norm() <= 0.01 * expected.norm()
