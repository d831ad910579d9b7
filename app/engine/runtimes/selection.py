"""Which runtime computes."""

from collections.abc import Sequence
from importlib.util import find_spec

from dinat.app.engine.runtimes.runtime import Runtime
from dinat.app.engine.runtimes.torch_runtime import TorchRuntime, resolve_devices
from dinat.app.settings import Settings
from dinat.model import ConfigError, DinatConfig, DinatImageProcessor
from dinat.model.attention.compiled import HEAD_DIM
from dinat.model.checkpoints.checkpoint import open_checkpoint
from dinat.model.native import library


def load_runtimes(settings: Settings) -> Sequence[Runtime]:
    """Load the checkpoint into the runtime that the settings name, once for each device.

    auto: PyTorch on a GPU, and on a CPU that attention is compiled for with vectors of 512 bits, which beats all else there; on
    others OpenVINO, where it is installed and nothing is asked for that only PyTorch has; PyTorch otherwise.
    Raises CheckpointError, ConfigError, ExportError, in one line that says what is missing and what to do.
    """
    name = settings.runtime
    devices = resolve_devices(settings.device)
    checkpoint = open_checkpoint(settings.model, revision=settings.revision)
    fixed_size = DinatImageProcessor.from_pretrained(checkpoint).output_size is not None
    on_cpu = devices[0].type == "cpu"

    if name == "auto":
        exported = on_cpu and settings.attention in ("auto", "tiled") and settings.precision != "fp16" and fixed_size
        is_best = exported and (
            settings.precision == "int8" or settings.attention == "tiled" or not _is_compiled(checkpoint.config)
        )
        name = "openvino" if is_best and find_spec("openvino") is not None else "torch"
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
    if not on_cpu:
        raise ConfigError(f"runtime {name} computes on a CPU, device is {settings.device}: take runtime torch, or device cpu")
    if not fixed_size:
        raise ConfigError(f"runtime {name} wants pictures of one size, {settings.model} keeps their aspect: take runtime torch")
    if settings.attention not in ("auto", "tiled"):
        raise ConfigError(f"runtime {name} has attention tiled, not {settings.attention}: take runtime torch")
    try:
        if name == "openvino":
            from dinat.app.engine.runtimes.openvino_runtime import OpenVinoRuntime

            return [OpenVinoRuntime(checkpoint, settings.precision, settings.cache_dir)]
        from dinat.app.engine.runtimes.onnx_runtime import OnnxRuntime
    except ImportError:
        extra = {"openvino": "cpu", "onnxruntime": "onnx"}[name]
        raise ConfigError(f"runtime {name} is not installed: pip install 'dinat-serve[{extra}]'") from None
    return [OnnxRuntime(checkpoint, settings.precision, settings.cache_dir)]


def _is_compiled(config: DinatConfig) -> bool:
    """Whether every layer's attention is compiled here, for vectors of 512 bits."""
    found = library()
    widths = {config.channels_of(stage) // heads for stage, heads in enumerate(config.num_heads)}
    return found is not None and found.lanes == 16 and widths == {HEAD_DIM}
