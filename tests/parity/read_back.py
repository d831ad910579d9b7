"""Check that transformers 4.53.3 loads what save_pretrained writes, in the environment of make_golden.py:

    /tmp/golden/bin/python -m tests.parity.read_back

Saves the included checkpoint, loads it with transformers' AutoConfig, DinatForImageClassification and AutoImageProcessor, and
compares the logits of the example digits.
"""

import tempfile
from pathlib import Path

import torch
import transformers
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor
from transformers.models.dinat import modeling_dinat

from dinat.model import DinatForImageClassification, DinatImageProcessor
from tests.parity.natten_rules import natten2dav, natten2dqkrpb


def main() -> None:
    assert transformers.__version__ == "4.53.3"
    modeling_dinat.requires_backends = lambda *_: None
    modeling_dinat.natten2dqkrpb, modeling_dinat.natten2dav = natten2dqkrpb, natten2dav
    images = [Image.open(path).convert("RGB") for path in sorted(Path("examples/digits").glob("*.png"))]
    ours, processor = DinatForImageClassification.from_pretrained("digits"), DinatImageProcessor.from_pretrained("digits")
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        ours.save_pretrained(folder)
        processor.save_pretrained(folder)
        assert AutoConfig.from_pretrained(folder).id2label == ours.config.id2label
        theirs, report = modeling_dinat.DinatForImageClassification.from_pretrained(folder, output_loading_info=True)
        assert not any(report.values()), report
        pixels = AutoImageProcessor.from_pretrained(folder)(images, return_tensors="pt")["pixel_values"]
        difference = (theirs(pixels).logits - ours(processor(images)).logits).abs().max().item()
    print(f"largest difference of {len(images)} x 10 logits: {difference:.1e}")
    assert difference < 1e-5


if __name__ == "__main__":
    main()
