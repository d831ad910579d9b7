"""The network in PyTorch: eager on a CPU; on a GPU as CUDA graphs, by whatever a card has shown to be right and fast."""

import warnings
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dinat.app.engine.runtimes.artifacts import digest
from dinat.app.engine.runtimes.cuda_graphs import LANES, CapturedComputation
from dinat.app.engine.runtimes.runtime import (
    LOGITS,
    Array,
    DeviceLost,
    DeviceUnusable,
    Disabled,
    InferenceOptions,
    InferenceResult,
    examples,
    prepared,
    rank,
)
from dinat.model import ConfigError, DinatForImageClassification, DinatImageProcessor, attention
from dinat.model.attention import bias_cache
from dinat.model.attention.autotune import autotuning, candidates, reason, selections
from dinat.model.checkpoints.checkpoint import Checkpoint
from dinat.model.cpu.features import has_bf16
from dinat.model.cpu.packing import pack
from dinat.model.cpu.resize import Pixels

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LIMITS = {"fp32": 1e-4, "bf16": 5e-2, "fp16": 5e-2}
"""How far logits on a card may be from float32 on the processor, of their norm. Half precision is 0.1 to 1.1 % off."""


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
    """A Runtime, as dinat.app.engine.runtimes.runtime has it."""

    name = "torch"

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: torch.device,
        precision: str,
        attention: str,
        cache: Path | None = None,
        self_check: bool = True,
    ) -> None:
        """Load the network. Raises CheckpointError, ConfigError.

        cache: where it is remembered which attention is the fastest on a card.  self_check: whether a card has to show right
        numbers before it serves.
        """
        self._checkpoint = checkpoint
        self._device = device
        self.device = str(device)
        self.lanes = LANES if device.type == "cuda" else 1
        self.default_batch = 64 if device.type == "cuda" else max(8, 2 * torch.get_num_threads())
        self.disabled: list[Disabled] = []
        self._attention = attention
        self._cache, self._self_check = cache, self_check
        self._captured: CapturedComputation | None = None
        self._largest = 0
        if device.type == "cuda":
            _let_float32_be_float32()
        self.processor = DinatImageProcessor.from_pretrained(checkpoint)
        self._load(self._precision(precision))
        self.config = self._network.config
        if self.config.num_labels == 0:
            raise ConfigError(f"{checkpoint.source} has no classifier: it cannot be served")

    def _load(self, precision: str) -> None:
        self.precision, self._dtype = precision, PRECISIONS[precision]
        self._network = DinatForImageClassification.from_pretrained(
            self._checkpoint, self._attention, self._device, self._dtype
        )
        if self._device.type == "cpu":
            pack(self._network.dinat)  # its head is computed in float32

    def run(self, pixels: Pixels | Array, wanted: Sequence[InferenceOptions]) -> list[InferenceResult]:
        """See Runtime."""
        with self._computing():
            batch = torch.from_numpy(pixels)
            names: frozenset[str] = frozenset().union(*(want.features for want in wanted))
            maps: dict[str, Tensor | list[Tensor]] = {}
            if self._captured is not None and not names and self._captured.takes(batch.shape) and batch.dtype == torch.uint8:
                scores, classes = self._captured.run(batch)
            else:
                logits, maps = self._network.classify(self._prepare(batch.to(self._device)), names - {LOGITS})
                maps[LOGITS] = logits
                scores, classes = rank(logits, self.config)
            most = max(want.top_k for want in wanted)
            top_scores, top_classes = scores[:, :most].cpu().numpy(), classes[:, :most].cpu().numpy()
            answers = []
            for i, want in enumerate(wanted):
                features = {name: _host(maps[name], i) for name in sorted(want.features)}
                answers.append(InferenceResult(top_classes[i, : want.top_k], top_scores[i, : want.top_k], features))
            return answers

    @contextmanager
    def _computing(self) -> Iterator[None]:
        """Inference on this device. Raises DeviceLost where an error has left the card useless."""
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)  # of this thread: Triton launches on the current one
        with torch.inference_mode():
            try:
                yield
            except Exception as error:
                self._check_alive(error)
                raise

    def _check_alive(self, error: Exception) -> None:
        """Raise DeviceLost if the card does not even wait for its work any more, as after an access outside its memory."""
        if self._device.type != "cuda":
            return
        try:
            torch.cuda.synchronize(self._device)
        except Exception:
            raise DeviceLost(f"{self.device} answers nothing any more: {reason(error)}") from error

    def _prepare(self, pixels: Tensor) -> Tensor:
        """(B, H, W, 3) on the device, as run takes it -> what the network takes."""
        return prepared(self.processor, pixels).to(self._dtype)

    def _compute(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """(B, H, W, 3) uint8 on the device -> scores and classes, as `rank` has them. What is captured."""
        return rank(self._network.classify(self._prepare(pixels))[0], self.config)

    def warm(self, max_batch: int) -> int:
        """See Runtime. On a GPU attention is chosen for each layer, precision checked, graphs captured and checked.

        What fails is left out, and something slower that is exact takes its place. Raises DeviceUnusable where float32 on this
        card is what it is on the processor.
        """
        if self._device.type == "cuda" and not self._largest:
            self._largest = self._settle(max_batch)
        largest = self._largest or max_batch
        for count in sorted({1, largest}):
            self.run(examples(self.processor, count), [InferenceOptions(top_k=1)] * count)
        return largest

    def _settle(self, max_batch: int) -> int:
        """Settle what computes on this card, for the largest batch up to max_batch that fits. Returns it."""
        size = 1 << (max_batch - 1).bit_length()
        batch = torch.from_numpy(examples(self.processor, size))
        with self._computing():
            while True:
                try:
                    self._settle_precision(batch[:size])
                    self._settle_graphs(batch[:size])
                    break
                except torch.OutOfMemoryError:
                    if size == 1:
                        raise
                    size //= 2
                    torch.cuda.empty_cache()
        if size < max_batch:
            self.disabled.append(Disabled(f"batches over {size}", f"they do not fit into the memory of {self.device}"))
        self.disabled += self._attention_left_out()
        return min(size, max_batch)

    def _settle_precision(self, batch: Tensor) -> None:
        """Choose every layer's attention, and float32 in the place of a precision that is off. batch: uint8, on the host."""
        few = batch[:2]
        exact: Tensor | None = None
        if self._self_check:
            reference = DinatForImageClassification.from_pretrained(self._checkpoint, "tiled")
            exact = reference.classify(self.processor.normalize(few))[0]
        memory = None if self._cache is None else self._cache / "attention" / f"{_card(self._device)}.json"
        while True:
            with autotuning(self._self_check, memory):
                self._network.classify(self._prepare(batch.to(self._device)))
            bias_cache.clear()  # what was made for those that were only tried
            if exact is None:
                return
            logits = self._network.classify(self._prepare(few.to(self._device)))[0].cpu()
            why = _fault(logits, exact, LIMITS[self.precision], "float32 on the processor")
            if why is None:
                return
            if self.precision == "fp32":
                raise DeviceUnusable(why)
            self.disabled.append(Disabled(f"precision {self.precision}", why))
            self._load("fp32")

    def _settle_graphs(self, batch: Tensor) -> None:
        """Capture the network for batches up to this one's size, and see what that gives. batch: uint8, on the host."""
        if self.processor.output_size is None:
            return  # every picture comes at a size of its own
        try:
            captured = CapturedComputation(self._compute, batch.to(self._device))
            why = self._graphs_fault(captured, batch) if self._self_check else None
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            self._check_alive(error)
            why = reason(error)
        if why is None:
            self._captured = captured
        else:
            self.disabled.append(Disabled("CUDA graphs", why))

    def _graphs_fault(self, captured: CapturedComputation, batch: Tensor) -> str | None:
        """What is wrong with the graphs, of every size; None if they give what the network gives without them."""
        size = batch.shape[0]
        while size:
            expected = _by_class(*(output.cpu() for output in self._compute(batch[:size].to(self._device))))
            why = _fault(_by_class(*captured.run(batch[:size])), expected, LIMITS[self.precision], "the same without a graph")
            if why is not None:
                return f"batches of {size}: {why}"
            size //= 2
        return None

    def _attention_left_out(self) -> list[Disabled]:
        layers = defaultdict(list)
        for layer, choice in selections.items():
            if (layer.device, layer.dtype) == (self.device, self._dtype):
                for name, why in choice.disabled.items():
                    layers[name].append(f"{layer}: {why}")
        return [
            Disabled(f"attention {name}", whys[0] if len(whys) == 1 else f"{whys[0]}; and for {len(whys) - 1} layers more")
            for name, whys in layers.items()
        ]

    def attention(self) -> dict[str, str]:
        """See Runtime. Where layers of a stage differ, the names of both."""
        mine = [
            (layer.heads, choice.backend)
            for layer, choice in selections.items()
            if (layer.device, layer.dtype, layer.requested_backend) == (self.device, self._dtype, self._attention)
        ]
        used = {heads: sorted({name for those, name in mine if those == heads}) for heads in self.config.num_heads}
        head_dim = self.config.embed_dim // self.config.num_heads[0]
        default = candidates(self._device, self._dtype, head_dim, self._attention)[0]
        names = self.config.stage_names[1:]
        return {name: " and ".join(used[heads]) or default for name, heads in zip(names, self.config.num_heads, strict=True)}

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
            return "bf16" if has_bf16() else "fp32"
        return half_precision(self._device)


def half_precision(device: torch.device) -> str:
    """The half precision that a card is fast at."""
    return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"


def _let_float32_be_float32() -> None:
    """Turn TF32 off, which PyTorch's defaults turn on for convolutions, and NVIDIA's containers for products: it is 1e-3 off.

    By the old flags: PyTorch 2.9 to 2.11 warn that there are new ones, but where those are set the old cannot even be read.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False


def _fault(got: Tensor, expected: Tensor, limit: float, of: str) -> str | None:
    """What is wrong with numbers, if anything is. Both on the host, of one shape."""
    error = float((got.double() - expected.double()).norm() / expected.double().norm())
    return None if error <= limit else f"its numbers are {error:.2g} off {of}, {limit:g} is allowed"


def _by_class(scores: Tensor, classes: Tensor) -> Tensor:
    """Ranked scores in the order of their classes."""
    return torch.empty_like(scores).scatter_(1, classes, scores)


def _card(device: torch.device) -> str:
    """A name for what decides on the speed of attention: the card, what computes on it, and this project's code."""
    versions = []
    for package in ("torch", "triton", "natten"):
        try:
            versions.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            versions.append(f"no {package}")
    code = [path.read_bytes() for path in sorted(Path(attention.__file__).parent.glob("*.py"))]
    card = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device), str(torch.version.cuda)
    return digest(*card, *versions, *code)


def _host(maps: Tensor | list[Tensor], i: int) -> Array | list[Array]:
    """One picture's map, or maps, as float32 arrays of their own on the host."""
    if isinstance(maps, list):
        return [np.ascontiguousarray(one[i].float().cpu().numpy()) for one in maps]
    return np.ascontiguousarray(maps[i].float().cpu().numpy())
