"""LitServe with dynamic batching, as in its documentation."""

import io
import sys
from typing import Any

import litserve
import torch
from fastapi import Request
from PIL import Image

from dinat.model import DinatForImageClassification, DinatImageProcessor


class Classifier(litserve.LitAPI):
    def setup(self, device: str) -> None:
        self.network = DinatForImageClassification.from_pretrained(sys.argv[1])
        self.processor = DinatImageProcessor.from_pretrained(sys.argv[1])

    # LitServe derives the endpoint's parameter from the annotation.
    def decode_request(self, request: Request) -> torch.Tensor:
        return self.processor(Image.open(io.BytesIO(request["image"].file.read())).convert("RGB"))[0]

    def batch(self, inputs: list[torch.Tensor]) -> torch.Tensor:
        return torch.stack(inputs)

    def predict(self, batch: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            return self.network(batch).logits.softmax(-1)

    def unbatch(self, output: torch.Tensor) -> list[torch.Tensor]:
        return list(output)

    def encode_response(self, output: torch.Tensor) -> dict[str, Any]:
        best = output.topk(5)
        return {"class_id": best.indices.tolist(), "score": best.values.tolist()}


if __name__ == "__main__":
    api = Classifier(max_batch_size=8, batch_timeout=0.002, api_path="/classify")
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=1)
    server.run(host="127.0.0.1", port=int(sys.argv[2]), generate_client_file=False, log_level="warning")
