"""Selection of the runtime by the settings, the hardware and the installed packages."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import structlog
import torch

from dinat.app.engine.runtimes import nvidia_driver
from dinat.app.engine.runtimes.runtime import Runtime
from dinat.app.engine.runtimes.torch_runtime import TorchRuntime, resolve_devices
from dinat.app.settings import Settings
from dinat.app.threads import limit_threads
from dinat.model import ConfigError, DinatConfig, DinatImageProcessor
from dinat.model.attention.compiled import HEAD_DIM
from dinat.model.checkpoints.checkpoint import open_checkpoint
from dinat.model.native import library

log = structlog.get_logger("dinat")


def load_runtimes(settings: Settings) -> Sequence[Runtime]:
    """Load the checkpoint into the runtime that the settings select, once for each device.

    RUNTIME=auto selects PyTorch on a GPU, and on a CPU with compiled attention for 512-bit vectors, where it is the fastest. On
    other CPUs it selects OpenVINO if that is installed and supports the other settings, else PyTorch.

    Raises:
        CheckpointError: The checkpoint cannot be loaded.
        ConfigError: The runtime or device does not support the settings, or is not installed.
        ExportError: The graph cannot be exported.
    """
    limit_threads(settings.threads)
    devices = resolve_devices(settings.device)
    checkpoint = open_checkpoint(settings.model, revision=settings.revision)
    processor = DinatImageProcessor.from_pretrained(checkpoint)
    on_cpu = devices[0].type == "cpu"
    if checkpoint.processor is None and Path(settings.model).is_dir():
        log.warning(
            "the folder has no preprocessor_config.json: images are processed as for published models", size=processor.size
        )
    if on_cpu:
        _warn_about_missing_gpu(settings)
    name = settings.runtime
    if name == "auto":
        prefer_openvino = on_cpu and _prefer_openvino(settings, checkpoint.config, processor)
        name = "openvino" if prefer_openvino and find_spec("openvino") is not None else "torch"
    if name == "torch":
        return [
            TorchRuntime(
                checkpoint,
                device,
                settings.precision,
                settings.attention,
                settings.cache_dir,
                settings.self_check,
            )
            for device in devices
        ]
    _check_exportable(name, settings, on_cpu, processor)
    try:
        if name == "openvino":
            from dinat.app.engine.runtimes.openvino_runtime import OpenVinoRuntime

            return [OpenVinoRuntime(checkpoint, settings.precision, settings.cache_dir)]
        from dinat.app.engine.runtimes.onnx_runtime import OnnxRuntime
    except ImportError:
        extra = {"openvino": "cpu", "onnxruntime": "onnx"}[name]
        raise ConfigError(f"runtime {name} is not installed: pip install 'dinat-serve[{extra}]'") from None
    return [OnnxRuntime(checkpoint, settings.precision, settings.cache_dir)]


def _warn_about_missing_gpu(settings: Settings) -> None:
    """Warn if PyTorch is built for CUDA but the CPU is used, unless the settings select it."""
    if settings.device == "auto" and torch.version.cuda is not None:
        log.warning(
            "no GPU was found, though PyTorch is a build for CUDA: the CPU is used. DINAT_DEVICE=cuda makes this an error",
            cuda=torch.version.cuda,
            reason=nvidia_driver.too_old() or "PyTorch finds no CUDA device",
        )


def _prefer_openvino(settings: Settings, config: DinatConfig, processor: DinatImageProcessor) -> bool:
    """Return whether OpenVINO supports the other settings, and is faster on this CPU than PyTorch or required for them."""
    if settings.attention not in ("auto", "tiled") or settings.precision == "fp16" or processor.output_size is None:
        return False
    return settings.precision == "int8" or settings.attention == "tiled" or not _has_compiled_attention(config)


def _check_exportable(runtime: str, settings: Settings, on_cpu: bool, processor: DinatImageProcessor) -> None:
    """Raise ConfigError if a runtime of exported graphs does not support the device, the image sizes or the attention."""
    if not on_cpu:
        raise ConfigError(f"runtime {runtime} requires a CPU, device is {settings.device}: set runtime torch, or device cpu")
    if processor.output_size is None:
        raise ConfigError(
            f"runtime {runtime} requires images of one size, {settings.model} keeps their aspect ratio: set runtime torch"
        )
    if settings.attention not in ("auto", "tiled"):
        raise ConfigError(f"runtime {runtime} supports attention tiled, not {settings.attention}: set runtime torch")


def _has_compiled_attention(config: DinatConfig) -> bool:
    """Whether compiled attention for 512-bit vectors supports every layer on this CPU."""
    kernels = library()
    widths = {config.channels_of(stage) // heads for stage, heads in enumerate(config.num_heads)}
    return kernels is not None and kernels.lanes == 16 and widths == {HEAD_DIM}
