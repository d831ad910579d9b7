"""The network in PyTorch: eager on a CPU, as CUDA graphs on a GPU."""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from queue import SimpleQueue

import numpy as np
import torch
from torch import Tensor

from app.engine.runtime import Answer, Array, Wanted, rank
from model import ConfigError, DinatForImageClassification, DinatImageProcessor
from model.attention.choice import candidates, chosen, timing
from model.image_processor import Pixels

CUDA_LANES = 2
"""Batches on a card at once: one computes, the next uploads."""
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def resolve_devices(device: str) -> list[torch.device]:
    """The devices that a setting names: cuda is every card that PyTorch sees, auto the same or else the processor.

    Raises ConfigError where this machine has no such device.
    """
    cards = [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    if device == "auto":
        return cards or [torch.device("cpu")]
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise ConfigError(f"device {device!r} is not known: take auto, cpu, cuda or cuda:N") from None
    if chosen.type not in ("cpu", "cuda"):
        raise ConfigError(f"device {device!r} is not served: take auto, cpu, cuda or cuda:N")
    if chosen.type == "cpu":
        return [chosen]
    if (chosen.index or 0) >= len(cards):
        raise ConfigError(
            f"device {device!r} is not there: PyTorch sees {len(cards)} CUDA devices; take cpu, install the driver, "
            "or give the container a card (docker run --gpus all)"
        )
    return cards if chosen.index is None else [chosen]


class TorchRuntime:
    """A Runtime, as app.engine.runtime has it."""

    name = "torch"

    def __init__(self, source: str, revision: str | None, device: torch.device, precision: str, attention: str) -> None:
        """Load the checkpoint. Raises CheckpointError, ConfigError."""
        self._device = device
        self.device = str(device)
        self.lanes = CUDA_LANES if device.type == "cuda" else 1
        self.precision = self._precision(precision)
        self.default_batch = 64 if self._device.type == "cuda" else 8
        self._attention = attention
        self._dtype = PRECISIONS[self.precision]
        self._network = DinatForImageClassification.from_pretrained(
            source, attention=attention, device=self._device, dtype=self._dtype, revision=revision
        )
        self.config = self._network.config
        if self.config.num_labels == 0:
            raise ConfigError(f"{source} has no classifier: it cannot be served")
        self.processor = DinatImageProcessor.from_pretrained(source, revision=revision)
        self._graphs: dict[int, CapturedGraph] = {}

    def run(self, pixels: Sequence[Pixels], wanted: Sequence[Wanted]) -> list[Answer]:
        """See Runtime."""
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)  # of this thread: Triton launches on the current one
        with torch.inference_mode():
            batch = torch.from_numpy(np.stack(pixels))
            names = frozenset().union(*(want.features for want in wanted))
            maps: dict[str, Tensor | list[Tensor]] = {}
            if self._device.type == "cuda" and not names:
                scores, classes = self._captured(batch)
            else:
                logits, maps = self._network.classify(self._prepare(batch.to(self._device)), names)
                scores, classes = rank(logits, self.config)
            most = max(want.top_k for want in wanted)
            top_scores, top_classes = scores[:, :most].cpu().numpy(), classes[:, :most].cpu().numpy()
            answers = []
            for i, want in enumerate(wanted):
                features = {name: _host(maps[name], i) for name in sorted(want.features)}
                answers.append(Answer(top_classes[i, : want.top_k], top_scores[i, : want.top_k], features))
            return answers

    def _prepare(self, pixels: Tensor) -> Tensor:
        """(B, H, W, 3) uint8 on the device -> what the network takes."""
        return self.processor.normalize(pixels).to(self._dtype)

    def _captured(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Scores and classes on the host, by the CUDA graph of the smallest size that holds the batch; captured when first met.

        Before that the network runs once as it is, and each layer that it has not met has its attention chosen by the clock.
        """
        size = 1 << (pixels.shape[0] - 1).bit_length()
        if size not in self._graphs:

            def compute(static: Tensor) -> tuple[Tensor, Tensor]:
                return rank(self._network.classify(self._prepare(static))[0], self.config)

            example = torch.zeros(size, *pixels.shape[1:], dtype=torch.uint8, device=self._device)
            with timing():
                compute(example)
            self._graphs[size] = CapturedGraph(compute, example)
        return self._graphs[size].run(pixels)

    def attention(self) -> dict[str, str]:
        """See Runtime. Where layers of a stage differ, the names of both."""
        if self._attention != "auto":
            return dict.fromkeys(self.config.stage_names[1:], self._attention)
        used = {
            heads: sorted(
                {choice.backend for layer, choice in chosen.items() if (layer.device, layer.heads) == (self.device, heads)}
            )
            for heads in self.config.num_heads
        }
        default = candidates(self._device)[0]
        names = self.config.stage_names[1:]
        return {name: " and ".join(used[heads]) or default for name, heads in zip(names, self.config.num_heads, strict=True)}

    def batch_sizes(self, max_batch: int) -> Sequence[int]:
        """See Runtime. On a GPU the sizes that are captured, the largest first, which decides on attention backends.

        Eager PyTorch makes nothing per batch size: the ends of the range are enough.
        """
        if self._device.type == "cuda":
            return [1 << power for power in reversed(range((max_batch - 1).bit_length() + 1))]
        return sorted({1, max_batch})

    def memory(self) -> int | None:
        """See Runtime."""
        return torch.cuda.memory_allocated(self._device) if self._device.type == "cuda" else None

    def is_out_of_memory(self, error: Exception) -> bool:
        """See Runtime. On a CPU, PyTorch's allocator raises a plain RuntimeError."""
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)

    def _precision(self, asked: str) -> str:
        if asked == "int8":
            raise ConfigError("precision int8 is served by OpenVINO alone: take runtime openvino, on a CPU")
        if asked != "auto":
            return asked
        if self._device.type != "cuda":
            return "fp32"
        return "bf16" if torch.cuda.get_device_capability(self._device) >= (8, 0) else "fp16"


@dataclass(frozen=True)
class Slot:
    """Where one batch passes: from pinned memory to the card on its own way there, and its outputs back to pinned memory."""

    pinned: Tensor
    uploaded: Tensor
    outputs: tuple[Tensor, Tensor]


class CapturedGraph:
    """A computation as a CUDA graph: no launch waits for Python.

    run may be called from CUDA_LANES threads at once: what the others bring uploads while one computes.
    """

    def __init__(self, compute: Callable[[Tensor], tuple[Tensor, Tensor]], example: Tensor) -> None:
        """Capture compute(example), which has run before. example: on the device, its first axis the batch."""
        self._input = example
        self._graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream(example.device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(example.device))
        with torch.cuda.stream(stream):
            compute(example)
        torch.cuda.current_stream(example.device).wait_stream(stream)
        with torch.cuda.graph(self._graph):
            self._outputs = compute(example)
        self._uploads = stream
        self._turn = threading.Lock()
        self._slots: SimpleQueue[Slot] = SimpleQueue()
        for _ in range(CUDA_LANES):
            first, second = (torch.empty_like(output, device="cpu", pin_memory=True) for output in self._outputs)
            pinned = torch.empty_like(example, device="cpu", pin_memory=True)
            self._slots.put(Slot(pinned, torch.empty_like(example), (first, second)))

    def run(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        """The outputs, on the host, for a batch on the host that is no larger than the example."""
        count = batch.shape[0]
        slot = self._slots.get()
        try:
            slot.pinned[:count].copy_(batch)
            with torch.cuda.stream(self._uploads):
                slot.uploaded[:count].copy_(slot.pinned[:count], non_blocking=True)
                uploaded = self._uploads.record_event()
            with self._turn:
                computing = torch.cuda.current_stream(self._input.device)
                computing.wait_event(uploaded)
                self._input[:count].copy_(slot.uploaded[:count])
                self._graph.replay()
                for output, host in zip(self._outputs, slot.outputs, strict=True):
                    host[:count].copy_(output[:count], non_blocking=True)
                done = computing.record_event()
            done.synchronize()
            first, second = slot.outputs
            return first[:count].clone(), second[:count].clone()
        finally:
            self._slots.put(slot)


def _host(maps: Tensor | list[Tensor], i: int) -> Array | list[Array]:
    """One picture's map, or maps, as float32 arrays of their own on the host."""
    if isinstance(maps, list):
        return [np.ascontiguousarray(one[i].float().cpu().numpy()) for one in maps]
    return np.ascontiguousarray(maps[i].float().cpu().numpy())
