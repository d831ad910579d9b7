"""A plain FastAPI endpoint, as in tutorials."""

import io
import sys

import torch
import uvicorn
from fastapi import FastAPI, UploadFile
from PIL import Image

from dinat.model import DinatForImageClassification, DinatImageProcessor

app = FastAPI()
network = DinatForImageClassification.from_pretrained(sys.argv[1])
processor = DinatImageProcessor.from_pretrained(sys.argv[1])


@app.post("/classify")
def classify(image: UploadFile) -> list[dict[str, float]]:
    with torch.inference_mode():
        scores = network(processor(Image.open(io.BytesIO(image.file.read())).convert("RGB"))).logits.softmax(-1)[0]
    best = scores.topk(5)
    return [{"class_id": int(i), "score": float(s)} for s, i in zip(best.values, best.indices, strict=True)]


if __name__ == "__main__":
    uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[2]), log_level="warning")
