"""Selection of the attention backend of each layer on a GPU: the fastest correct candidate, determined once per layer shape.

Inside autotuning(), a layer seen for the first time runs every candidate on random input of its shape, with its own bias table,
and compares the output with the reference; a further layer of this shape checks the selected candidate with its table. The
correct ones are timed as CUDA graphs, as in serving. A candidate that raises, exceeds the error limit
or cannot be captured is disabled, with the reason. Selections can be stored in a file and reused by later processes.
"""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from dinat.model.attention import compiled
from dinat.model.attention.reference import reference_attention
from dinat.model.errors import AttentionError

ROUNDS, REPEATS = 7, 4
"""Timing rounds per candidate, and calls per round in a CUDA graph."""
MAX_ERROR = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 1e-2}
"""Largest allowed error of a candidate by dtype, relative to the norm of the reference output."""
FALLBACKS = ("tiled", "reference")
"""Backends used when all candidates are disabled; the last one is not checked, because it is the reference itself."""

Attend = Callable[[str, Tensor, Tensor, Tensor, Tensor | None], Tensor]
"""Attention of a layer by a candidate's name: (name, q, k, v, rpb) to the output; q, k, v (B, H, W, heads, head_dim)."""


@dataclass(frozen=True)
class LayerKey:
    """Properties of a layer that determine the speed of a backend. Of the batch size, only whether it is 1.

    Attributes:
        device: Device, as torch names it.
        requested_backend: Backend that the user requested.
        is_single: Whether the batch has one image, which leaves most of a GPU idle.
    """

    device: str
    dtype: torch.dtype
    height: int
    width: int
    heads: int
    head_dim: int
    kernel_size: int
    dilation: int
    scale: float
    has_rpb: bool = True
    requested_backend: str = "auto"
    is_single: bool = False

    @classmethod
    def of(
        cls, q: Tensor, kernel_size: int, dilation: int, scale: float, has_rpb: bool = True, requested_backend: str = "auto"
    ) -> "LayerKey":
        """Return the key of a layer with queries q (B, H, W, heads, head_dim)."""
        batch, height, width, heads, head_dim = q.shape
        layer = height, width, heads, head_dim, kernel_size, dilation, scale, has_rpb, requested_backend
        return cls(str(q.device), q.dtype, *layer, batch == 1)

    def __str__(self) -> str:
        """Describe the layer, such as "56x56 feature map, 2 heads, kernel 7, dilation 8"."""
        size = f"{self.height}x{self.width} feature map"
        return f"{size}, {self.heads} heads, kernel {self.kernel_size}, dilation {self.dilation}"

    @property
    def file_key(self) -> str:
        """Key in a file of selections. It omits the device, because each GPU model has its own file."""
        return repr((*(value for name, value in asdict(self).items() if name != "device"),))


@dataclass(frozen=True)
class Selection:
    """The backend of a layer, and the measurements that led to it.

    Attributes:
        backend: Name of the selected candidate.
        seconds: Median time of each timed candidate.
        errors: Relative error of each checked candidate.
        disabled: Reason for each disabled candidate.
    """

    backend: str
    seconds: dict[str, float] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    disabled: dict[str, str] = field(default_factory=dict)


selections: dict[LayerKey, Selection] = {}
"""Selections made in this process."""


def candidates(device: torch.device, dtype: torch.dtype, head_dim: int, requested_backend: str = "auto") -> list[str]:
    """Return the names of the candidates for a layer; the first one is used without autotuning.

    A candidate is a backend, or "triton" and one of its tile configurations, or "natten" and one of NATTEN's backends.
    """
    if requested_backend == "auto" and device.type != "cuda":
        return ["compiled", "tiled"] if compiled.supports_heads(dtype, head_dim) else ["tiled"]
    backends = [requested_backend]
    if requested_backend == "auto":
        backends = [*_installed_backends(), "tiled"] if dtype in MAX_ERROR and has_kernels(device) else ["tiled"]
    names = []
    for backend in backends:
        if backend == "triton":
            names += _triton_candidates(dtype, head_dim, requested_backend)
        elif backend == "natten" and device.type == "cuda":
            names += _natten_candidates(device, dtype, head_dim, requested_backend)
        else:
            names.append(backend)
    return names


def has_kernels(device: torch.device) -> bool:
    """Return whether a GPU's tensor cores are used by the kernels: from compute capability 8.0.

    For 7.5, Triton multiplies without them and spills registers (benchmarks/kernel_resources.py).
    """
    return torch.cuda.get_device_properties(device).major >= 8  # torch.compile evaluates this, not get_device_capability


def _triton_candidates(dtype: torch.dtype, head_dim: int, requested_backend: str) -> list[str]:
    from dinat.model.attention.triton_kernel import HEAD_DIMS, tile_configs

    if head_dim not in HEAD_DIMS and requested_backend != "triton":
        return []
    return [f"triton {config}" for config in tile_configs(dtype, head_dim)]


def _natten_candidates(device: torch.device, dtype: torch.dtype, head_dim: int, requested_backend: str) -> list[str]:
    from dinat.model.attention.natten_backend import compatible_backends

    names = [f"natten {name}".rstrip() for name in compatible_backends(head_dim, dtype, device)]
    return names or (["natten"] if requested_backend == "natten" else [])


@cache
def _installed_backends() -> list[str]:
    """Return the backends whose package is installed and can be imported."""
    modules = {"triton": "dinat.model.attention.triton_kernel", "natten": "natten"}
    return [name for name, module in modules.items() if find_spec(name) is not None and _is_importable(module)]


def _is_importable(module: str) -> bool:
    try:
        import_module(module)
    except Exception:
        return False
    return True


@contextmanager
def autotuning(check: bool = True, file: Path | None = None) -> Iterator[None]:
    """Autotune each layer that is seen for the first time inside this context. For one thread at a time.

    Args:
        check: Whether to compare candidates with the reference before timing them.
        file: Stored selections, which are read and updated; it need not exist. Of a stored selection, only the selected
            candidate is checked again.
    """
    global _session
    _session = _Session(check, _read(file))
    try:
        yield
        if file is not None:
            with suppress(OSError):  # without a file, the next process tunes again
                _write(file)
    finally:
        _session = None


@dataclass(frozen=True)
class _Session:
    """Autotuning in progress.

    Attributes:
        stored: Selections from the file, by LayerKey.file_key.
        errors: Relative error by layer, batch of 1 or not, identifier of its bias table, and candidate.
    """

    check: bool
    stored: dict[str, Selection]
    errors: dict[tuple[LayerKey, int, str], float] = field(default_factory=dict)


_session: _Session | None = None
_failed: set[tuple[str, str]] = set()
"""Device and name of candidates that were disabled for some layer."""


def select_backend(
    layer: LayerKey, names: Sequence[str], attend: Attend, q: Tensor, k: Tensor, v: Tensor, rpb: Tensor | None
) -> str:
    """Return the candidate for a layer.

    This is the layer's existing selection; inside autotuning() the fastest correct candidate; otherwise the first of `names`
    that was not disabled for another layer.

    Args:
        layer: Key of the layer.
        names: Candidates, see `candidates`.
        attend: Computes the layer by a candidate's name.
        q: Queries (B, H, W, heads, head_dim). The candidates are timed with the four tensors.
        k: Keys, of the same shape.
        v: Values, of the same shape.
        rpb: Relative positional bias (heads, 2 * kernel_size - 1, 2 * kernel_size - 1), or None.
    """
    selection = selections.get(layer)
    if _session is not None:
        selection = selections[layer] = _autotune(_session, layer, names, attend, (q, k, v, rpb), selection)
        _failed.update((layer.device, name) for name in selection.disabled)
    selection = selection or selections.get(replace(layer, is_single=not layer.is_single))
    if selection is not None:
        return selection.backend
    enabled = (name for name in (*names, *FALLBACKS) if (layer.device, name) not in _failed)
    return next(enabled, FALLBACKS[-1])


def _autotune(
    session: _Session,
    layer: LayerKey,
    names: Sequence[str],
    attend: Attend,
    inputs: tuple[Tensor, Tensor, Tensor, Tensor | None],
    selection: Selection | None,
) -> Selection:
    """Return the selection of a layer. `selection` is that of another layer with this key, which may have another table."""
    errors: dict[str, float] = {}
    disabled = dict(selection.disabled) if selection is not None else {}
    check = _ErrorCheck(session, layer, attend, inputs[3])

    def is_correct(name: str) -> bool:
        try:
            if session.check and name != "reference":
                errors[name] = check.relative_error(name)
                limit = MAX_ERROR[layer.dtype]
                if not errors[name] <= limit:
                    disabled[name] = f"relative error {errors[name]:.2g} exceeds the limit of {limit:g}"
        except AttentionError as error:  # the backend does not support this layer
            if layer.requested_backend == "auto":
                return False
            disabled[name] = reason(error)
        except Exception as error:
            disabled[name] = reason(error)
        return name not in disabled

    if selection is not None and is_correct(selection.backend):
        return selection
    stored = session.stored.get(layer.file_key) if selection is None else None
    if stored is not None and stored.backend in (*names, *FALLBACKS) and is_correct(stored.backend):
        return stored
    for group in (names, *([fallback] for fallback in FALLBACKS)):
        correct = [name for name in group if name not in disabled and is_correct(name)]
        times, failed = _time_candidates(correct, attend, inputs)
        if times:
            return Selection(min(times, key=lambda name: times[name]), times, errors, disabled | failed)
        disabled |= failed
    return Selection(FALLBACKS[-1], {}, errors, disabled)


def _time_candidates(
    names: Sequence[str], attend: Attend, inputs: tuple[Tensor, Tensor, Tensor, Tensor | None]
) -> tuple[dict[str, float], dict[str, str]]:
    """Return the seconds of each candidate, and the reason for each that failed. If no CUDA graph works, time plain calls."""
    q, k, v, rpb = inputs
    failed: dict[str, str] = {}
    timers: list[Callable[[Callable[[], object], torch.device], float]] = [seconds]
    for timer in [seconds_on_gpu, *timers] if q.device.type == "cuda" else timers:
        times: dict[str, float] = {}
        for name in names:
            try:
                times[name] = timer(lambda: attend(name, q, k, v, rpb), q.device)  # noqa: B023
            except Exception as error:
                failed[name] = reason(error)
        if times:
            return times, {name: why for name, why in failed.items() if name not in times}
    return {}, failed


class _ErrorCheck:
    """Random input of a layer's shape, with a batch of 2, its bias table, and the reference output, computed on first use."""

    def __init__(self, session: _Session, layer: LayerKey, attend: Attend, rpb: Tensor | None) -> None:
        self._session, self._layer, self._attend, self._rpb = session, replace(layer, is_single=False), attend, rpb
        self._expected: Tensor | None = None

    def relative_error(self, name: str) -> float:
        """Return the norm of a candidate's error over the norm of the reference output; NaN if the candidate returns NaN."""
        layer = self._layer
        key = layer, id(self._rpb), name
        if key not in self._session.errors:
            self._session.errors[key] = self._measure(name)
        return self._session.errors[key]

    def _measure(self, name: str) -> float:
        layer = self._layer
        if self._expected is None:
            shape = (2, layer.height, layer.width, 3, layer.heads, layer.head_dim)
            self._qkv = torch.randn(shape, device=layer.device).to(layer.dtype)
            self._expected = float64_reference(self._qkv, self._rpb, layer.kernel_size, layer.dilation, layer.scale)
        q, k, v = self._qkv.unbind(3)
        output = self._attend(name, q, k, v, self._rpb)
        return float((output.double() - self._expected).norm() / self._expected.norm())


def float64_reference(qkv: Tensor, rpb: Tensor | None, kernel_size: int, dilation: int, scale: float) -> Tensor:
    """Compute reference attention in float64, one head at a time to use less memory.

    Args:
        qkv: Queries, keys and values (B, H, W, 3, heads, head_dim).
        rpb: Relative positional bias (heads, 2 * kernel_size - 1, 2 * kernel_size - 1), or None.
        kernel_size: Window size.
        dilation: Distance between neighboring keys of a window.
        scale: Factor of q k^T.

    Returns:
        Tensor (B, H, W, heads, head_dim) float64.
    """
    heads = []
    for head in range(qkv.shape[4]):
        q, k, v = qkv[..., head : head + 1, :].double().unbind(3)
        bias = None if rpb is None else rpb[head : head + 1].double()
        heads.append(reference_attention(q, k, v, bias, kernel_size, dilation, scale)[0])
    return torch.cat(heads, dim=3)


def reason(error: Exception) -> str:
    """Return an exception's type and message in one line of at most 200 characters."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """Return the median duration of a call in seconds."""

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    times = []
    for _ in range(2 + ROUNDS):
        started = now()
        run()
        times.append(now() - started)
    return median(times[2:])


def seconds_on_gpu(run: Callable[[], object], device: torch.device) -> float:
    """Return the median duration in seconds of a call inside a CUDA graph, after one call outside it."""
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    current = torch.cuda.current_stream(device)
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        run()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            for _ in range(REPEATS):
                run()
        times = []
        for _ in range(1 + ROUNDS):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            start.record(stream)
            graph.replay()
            end.record(stream)
            end.synchronize()
            times.append(start.elapsed_time(end) / 1e3 / REPEATS)
    current.wait_stream(stream)
    return float(median(times[1:]))


def _read(file: Path | None) -> dict[str, Selection]:
    """Return the stored selections by LayerKey.file_key; none if the file does not exist or cannot be read."""
    try:
        rows = json.loads(file.read_text()) if file is not None else {}
        return {str(key): Selection(**row) for key, row in rows.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _write(file: Path) -> None:
    """Add the selections to a file atomically. Those with disabled candidates are not stored: the cause may be temporary."""
    rows = _read(file) | {layer.file_key: selection for layer, selection in selections.items() if not selection.disabled}
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(f".{time.monotonic_ns()}")
    temporary.write_text(json.dumps({key: asdict(selection) for key, selection in rows.items()}, indent=1))
    temporary.replace(file)
