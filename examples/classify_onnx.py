"""Classify an image with an exported graph and ONNX Runtime, without this project.

dinat export digits digits.onnx
python examples/classify_onnx.py digits.onnx examples/digits/7-1.png
"""

import json
import sys

import numpy as np
import onnxruntime
from PIL import Image

session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
metadata = session.get_modelmeta().custom_metadata_map
labels, processor = json.loads(metadata["labels"]), json.loads(metadata["image_processor"])
_, _, height, width = session.get_inputs()[0].shape

image = Image.open(sys.argv[2]).convert("RGB").resize((width, height), processor["resample"])
pixels = np.asarray(image, dtype=np.float32) * np.float32(processor["rescale_factor"])
pixels = (pixels - np.float32(processor["image_mean"])) / np.float32(processor["image_std"])
(logits,) = session.run(["logits"], {"pixel_values": pixels.transpose(2, 0, 1)[None]})

scores = np.exp(logits[0] - logits[0].max())
scores /= scores.sum()
for index in np.argsort(-scores)[:5]:
    print(f"{scores[index]:.6f} {labels[index]}")
