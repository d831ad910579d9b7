"""Ray Serve with a FastAPI ingress and dynamic batching, as in its documentation."""

import io
import sys
from typing import Any

import torch
from fastapi import FastAPI, UploadFile
from PIL import Image
from ray import serve

from benchmarks.peers.on_ray import run
from dinat.model import DinatForImageClassification, DinatImageProcessor

app = FastAPI()


@serve.deployment(max_ongoing_requests=64)
@serve.ingress(app)
class Classifier:
    def __init__(self, folder: str) -> None:
        torch.set_num_threads(2)
        self.network = DinatForImageClassification.from_pretrained(folder)
        self.processor = DinatImageProcessor.from_pretrained(folder)

    @serve.batch(max_batch_size=8, batch_wait_timeout_s=0.002)
    async def predict(self, images: list[bytes]) -> list[dict[str, Any]]:
        pixels = self.processor([Image.open(io.BytesIO(data)).convert("RGB") for data in images])
        with torch.inference_mode():
            best = self.network(pixels).logits.softmax(-1).topk(5)
        return [{"class_id": i.tolist(), "score": s.tolist()} for s, i in zip(best.values, best.indices, strict=True)]

    @app.post("/classify")
    async def classify(self, image: UploadFile) -> dict[str, Any]:
        return await self.predict(await image.read())


if __name__ == "__main__":
    run(lambda: Classifier.bind(sys.argv[1]), int(sys.argv[2]))
