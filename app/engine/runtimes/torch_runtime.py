"""The network in PyTorch: eager on the CPU; on a GPU as CUDA graphs, with the fastest attention that passes the self-check."""

import threading
import warnings
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import dinat.model.gpu as gpu_kernels
from dinat.app.engine.runtimes import nvidia_driver
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
    describe_not_finite,
    examples,
    rank,
    run_examples,
    to_pixel_values,
)
from dinat.app.host import GRACE_SECONDS, exit_after
from dinat.model import ConfigError, DinatForImageClassification, DinatImageProcessor, attention
from dinat.model.attention import bias_cache
from dinat.model.attention.autotune import LayerKey, OnHang, autotuning, candidates, forget_disabled, reason, selections
from dinat.model.checkpoints.checkpoint import Checkpoint
from dinat.model.cpu.features import has_bf16
from dinat.model.cpu.packing import pack
from dinat.model.cpu.resize import Pixels
from dinat.model.errors import CheckpointError
from dinat.model.gpu.fusing import fuse

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TOLERANCES = {"fp32": 1e-4, "bf16": 5e-2, "fp16": 5e-2}
"""Largest relative error (2-norm) of logits on a GPU, against float32 on the CPU. Half precision has 0.1 to 1.1 %."""


OUT_OF_MEMORY = "can't allocate memory", "out of memory", "ALLOC_FAILED"
"""In errors of other types: of PyTorch's allocator on a CPU; of CUDA, as when it loads or replays a graph; and of cuBLAS."""


def resolve_devices(device: str) -> list[torch.device]:
    """The devices that a setting selects.

    Args:
        device: "cuda" for all GPUs, "cuda:N", "cpu", or "auto": all GPUs, or the CPU if there are none.

    Raises:
        ConfigError: The setting is invalid, there is no such device, or the driver is too old for PyTorch.
    """
    too_old = nvidia_driver.too_old()  # device_count() counts GPUs of such a driver too
    gpus = [torch.device("cuda", i) for i in range(torch.cuda.device_count())] if too_old is None else []
    if device == "auto":
        return gpus or [torch.device("cpu")]
    try:
        selected = torch.device(device)
    except RuntimeError:
        raise ConfigError(f"unknown device {device!r}: set auto, cpu, cuda or cuda:N") from None
    if selected.type not in ("cpu", "cuda"):
        raise ConfigError(f"device {device!r} is not supported: set auto, cpu, cuda or cuda:N")
    if selected.type == "cpu":
        return [selected]
    if too_old is not None:
        raise ConfigError(f"device {device!r} is not available: {too_old}")
    if (selected.index or 0) >= len(gpus):
        raise ConfigError(
            f"device {device!r} is not available, PyTorch finds {len(gpus)} CUDA devices: set cpu, install the driver, "
            "or give the container a GPU (docker run --gpus all)"
        )
    return gpus if selected.index is None else [selected]


class TorchRuntime:
    """A Runtime in PyTorch; see dinat.app.engine.runtimes.runtime.Runtime.

    Args:
        checkpoint: The checkpoint to load.
        device: A CPU or one GPU.
        precision: "auto" or a key of PRECISIONS. auto: bf16 or fp16 if the device is fast at it, else fp32.
        attention: An attention backend, or "auto".
        cache: Folder in which the fastest attention backends of a GPU are stored; not stored if None.
        self_check: Whether results on a GPU are checked before it is used.

    Raises:
        CheckpointError: The checkpoint cannot be loaded.
        ConfigError: The checkpoint has no classifier, or the precision is not supported.
    """

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
            _disable_tf32()
        self.processor = DinatImageProcessor.from_pretrained(checkpoint)
        self._load(self._resolve_precision(precision))
        self.config = self._network.config
        if self.config.num_labels == 0:
            raise ConfigError(f"{checkpoint.source} has no classifier: it cannot be served")

    def _load(self, precision: str) -> None:
        self.precision, self._dtype = precision, PRECISIONS[precision]
        self._network = DinatForImageClassification.from_pretrained(
            self._checkpoint, self._attention, self._device, self._dtype
        )
        if self._device.type == "cpu":
            pack(self._network.dinat)  # the head stays in float32
        else:
            fuse(self._network)

    def run(self, pixels: Pixels | Array, options: Sequence[InferenceOptions]) -> list[InferenceResult]:
        """See Runtime."""
        with self._computing():
            batch = torch.from_numpy(pixels)
            top_k = max(image_options.top_k for image_options in options)
            names: frozenset[str] = frozenset().union(*(image_options.features for image_options in options))
            feature_maps: dict[str, Tensor | list[Tensor]] = {}
            if self._captured is not None and not names and self._captured.accepts(batch.shape) and batch.dtype == torch.uint8:
                scores, classes = self._captured.run(batch, top_k)
            else:
                logits, feature_maps = self._network.classify(self._prepare(batch.to(self._device)), names - {LOGITS})
                feature_maps[LOGITS] = logits
                scores, classes = rank(logits, self.config)
            top_scores, top_classes = scores[:, :top_k].cpu().numpy(), classes[:, :top_k].cpu().numpy()
            results = []
            for i, image_options in enumerate(options):
                features = {name: _to_numpy(feature_maps[name], i) for name in sorted(image_options.features)}
                results.append(
                    InferenceResult(top_classes[i, : image_options.top_k], top_scores[i, : image_options.top_k], features)
                )
            return results

    @contextmanager
    def _computing(self) -> Iterator[None]:
        """Inference mode on this device. Raises DeviceLost if an error has left the GPU unusable."""
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)  # of this thread: Triton launches kernels on the current device
        with torch.inference_mode():
            try:
                yield
            except Exception as error:
                self._check_responding(error)
                raise

    def _check_responding(self, error: Exception) -> None:
        """Raise DeviceLost if the GPU no longer synchronizes, as after an illegal memory access."""
        if self._device.type != "cuda":
            return
        try:
            torch.cuda.synchronize(self._device)
        except Exception:
            raise DeviceLost(f"{self.device} no longer responds: {reason(error)}") from error

    def _prepare(self, pixels: Tensor) -> Tensor:
        """Convert pixels on the device, (B, H, W, 3) as for run, to the network's input."""
        return to_pixel_values(self.processor, pixels, self._dtype)

    def _compute(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Scores and classes, as from `rank`, of (B, H, W, 3) uint8 on the device. This is captured as CUDA graphs."""
        return rank(self._network.classify(self._prepare(pixels))[0], self.config)

    def warm(self, max_batch: int) -> int:
        """See Runtime. On a GPU: select the implementation of each step, check precision, capture and check CUDA graphs.

        What fails is disabled, and a slower, exact alternative is used. A kernel that hangs can only be ended with the process,
        which therefore exits after GRACE_SECONDS.

        Raises:
            DeviceUnusable: The GPU returns wrong numbers in float32.
            CheckpointError: The checkpoint returns scores that are not finite on the CPU.
            RuntimeError: A kernel hangs.
        """
        if self._device.type == "cuda" and not self._largest:
            self._largest = self._configure_in_thread(max_batch)
        largest = self._largest or max_batch
        for count in sorted({1, largest}):
            try:
                run_examples(self, self._checkpoint.source, count)
            except CheckpointError as error:
                if self._device.type == "cpu":
                    raise
                raise DeviceUnusable("it returned scores that are not finite") from error  # the CPU shows whose fault it is
        return largest

    def _configure_in_thread(self, max_batch: int) -> int:
        """Call _configure in a thread of its own, which a kernel that hangs never leaves. Raises RuntimeError then."""
        largest: Future[int] = Future()

        def on_hang(what: str, is_stored: bool) -> None:
            exit_after(GRACE_SECONDS, 1, lambda: None)  # the driver may wait for the kernel when the process exits
            advice = "the next start does not use it" if is_stored else "set ATTENTION to another backend, or DEVICE to cpu"
            with suppress(InvalidStateError):
                largest.set_exception(RuntimeError(f"{self.device} hangs in {what}; {advice}"))

        def configure() -> None:
            with suppress(InvalidStateError):
                try:
                    size = self._configure(max_batch, on_hang)
                except BaseException as error:  # DeviceLost is no Exception
                    largest.set_exception(error)
                else:
                    largest.set_result(size)

        threading.Thread(target=configure, daemon=True).start()
        return largest.result()

    def _configure(self, max_batch: int, on_hang: OnHang) -> int:
        """Configure the GPU for the largest batch, up to max_batch, that fits into its memory. Return that batch size."""
        size = 1 << (max_batch - 1).bit_length()
        batch = torch.from_numpy(examples(self.processor, size))
        with self._computing(), _cudnn_benchmark():
            while True:
                try:
                    self._select_precision(batch[:size], on_hang)
                    self._capture_graphs(batch[:size])
                    break
                except torch.OutOfMemoryError:
                    if size == 1:
                        raise
                    size //= 2
                    torch.cuda.empty_cache()
                    forget_disabled(self.device)
        if size < max_batch:
            self.disabled.append(Disabled(f"batches over {size}", f"out of memory on {self.device}"))
        self.disabled += self._disabled_candidates()
        return min(size, max_batch)

    def _select_precision(self, batch: Tensor, on_hang: OnHang) -> None:
        """Select the implementation of each step, and fall back to float32 if the precision fails its check.

        Args:
            batch: uint8, on the host.
            on_hang: See autotuning.
        """
        last = batch[-2:]  # at the largest addresses
        exact: Tensor | None = None
        if self._self_check:
            reference = DinatForImageClassification.from_pretrained(self._checkpoint, "tiled")
            exact = reference.classify(self.processor.normalize(last))[0]
            if not exact.isfinite().all():
                raise CheckpointError(describe_not_finite(self._checkpoint.source, "fp32"))
        cache = None if self._cache is None else self._cache / "attention" / f"{_attention_key(self._device)}.json"
        while True:
            with autotuning(self._self_check, cache, on_hang):
                for images in (batch, batch[:1]):
                    self._network.classify(self._prepare(images.to(self._device)))
            bias_cache.clear()  # entries of backends that were only tried
            if exact is None:
                return
            fault = self._network_fault(batch, exact) or self._network_fault(batch[-1:], exact[-1:])
            if fault is None:
                return
            if self.precision == "fp32":
                raise DeviceUnusable(fault)
            self.disabled.append(Disabled(f"precision {self.precision}", fault))
            self._load("fp32")

    def _network_fault(self, batch: Tensor, exact: Tensor) -> str | None:
        """Compare the logits of the last images of a batch with exact ones. Return what is wrong, or None."""
        logits = self._network.classify(self._prepare(batch.to(self._device)))[0][-len(exact) :].cpu()
        return _fault(logits, exact, TOLERANCES[self.precision], "float32 on the CPU")

    def _capture_graphs(self, batch: Tensor) -> None:
        """Capture the network for batches up to this size, and check the results of the graphs.

        Args:
            batch: uint8, on the host.
        """
        if self.processor.output_size is None:
            return  # image sizes differ
        try:
            captured = CapturedComputation(self._compute, batch.to(self._device))
            fault = self._graphs_fault(captured, batch) if self._self_check else None
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            self._check_responding(error)
            fault = reason(error)
        if fault is None:
            self._captured = captured
        else:
            self.disabled.append(Disabled("CUDA graphs", fault))

    def _graphs_fault(self, captured: CapturedComputation, batch: Tensor) -> str | None:
        """Compare the graphs of all sizes with the network without graphs. Return what is wrong, or None."""
        size = batch.shape[0]
        while size:
            expected = _by_class(*(output.cpu() for output in self._compute(batch[:size].to(self._device))))
            actual = _by_class(*captured.run(batch[:size]))
            fault = _fault(actual, expected, TOLERANCES[self.precision], "the network without a graph")
            if fault is not None:
                return f"batches of {size}: {fault}"
            size //= 2
        return None

    def _disabled_candidates(self) -> list[Disabled]:
        steps = defaultdict(list)
        for key, choice in selections.items():
            if (key.device, key.dtype) == (self.device, self._dtype):
                for name, why in choice.disabled.items():
                    steps[f"{key.kind} {name}"].append(f"{key}: {why}")
        return [
            Disabled(name, reasons[0] if len(reasons) == 1 else f"{reasons[0]}; and {len(reasons) - 1} more layers")
            for name, reasons in steps.items()
        ]

    def attention(self) -> dict[str, str]:
        """See Runtime. If layers of a stage differ, the names are joined by "and"."""
        selected = [
            (layer.heads, choice.backend)
            for layer, choice in selections.items()
            if isinstance(layer, LayerKey)
            and (layer.device, layer.dtype, layer.requested_backend) == (self.device, self._dtype, self._attention)
        ]
        used = {heads: sorted({name for key, name in selected if key == heads}) for heads in self.config.num_heads}
        head_dim = self.config.embed_dim // self.config.num_heads[0]
        default = candidates(self._device, self._dtype, head_dim, self._attention)[0]
        names = self.config.stage_names[1:]
        return {name: " and ".join(used[heads]) or default for name, heads in zip(names, self.config.num_heads, strict=True)}

    def memory(self) -> int | None:
        """See Runtime."""
        return torch.cuda.memory_allocated(self._device) if self._device.type == "cuda" else None

    def is_out_of_memory(self, error: Exception) -> bool:
        """See Runtime."""
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        if isinstance(error, torch.OutOfMemoryError | MemoryError):
            return True
        return any(message in str(error) for message in OUT_OF_MEMORY)

    def _resolve_precision(self, precision: str) -> str:
        if precision == "int8":
            raise ConfigError("precision int8 is only supported by OpenVINO: set runtime openvino, on a CPU")
        if precision != "auto":
            return precision
        if self._device.type != "cuda":
            return "bf16" if has_bf16() else "fp32"
        return half_precision(self._device)


def half_precision(device: torch.device) -> str:
    """The half precision that a GPU is fast at."""
    return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"


def _disable_tf32() -> None:
    """Disable TF32, whose relative error is 1e-3.

    PyTorch enables it by default for convolutions, NVIDIA's containers for matrix products. This sets the old flags: PyTorch
    2.9 to 2.11 warn about new ones, but once the new ones are set the old ones cannot even be read.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False


@contextmanager
def _cudnn_benchmark() -> Iterator[None]:
    """Let cuDNN measure its algorithms for each convolution that runs for the first time, and use the fastest from then on."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def _fault(actual: Tensor, expected: Tensor, tolerance: float, reference: str) -> str | None:
    """Compare two tensors on the host, of one shape. Return what is wrong, or None if their relative error is tolerable."""
    error = float((actual.double() - expected.double()).norm() / expected.double().norm())
    return None if error <= tolerance else f"relative error {error:.2g} against {reference}, {tolerance:g} is allowed"


def _by_class(scores: Tensor, classes: Tensor) -> Tensor:
    """Reorder ranked scores by class."""
    return torch.empty_like(scores).scatter_(1, classes, scores)


def _attention_key(device: torch.device) -> str:
    """A digest of what the speed of candidates depends on: the GPU, the packages, and this project's kernels."""
    versions = []
    for package in ("torch", "triton", "natten"):
        try:
            versions.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            versions.append(f"no {package}")
    folders = [Path(package.__path__[0]) for package in (attention, gpu_kernels)]
    code = [path.read_bytes() for folder in folders for path in sorted(folder.glob("*.py"))]
    gpu = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device), str(torch.version.cuda)
    return digest(*gpu, *versions, *code)


def _to_numpy(feature_map: Tensor | list[Tensor], i: int) -> Array | list[Array]:
    """The feature map of image i, or the list of them, as float32 arrays on the host, copied out of the batch."""
    if isinstance(feature_map, list):
        return [np.ascontiguousarray(hidden_state[i].float().cpu().numpy()) for hidden_state in feature_map]
    return np.ascontiguousarray(feature_map[i].float().cpu().numpy())
