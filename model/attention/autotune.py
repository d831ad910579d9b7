"""Selection of the implementation of each step of a network on a GPU: the fastest correct candidate, once per shape.

A step is the attention of a layer (`select_backend`), or what model/gpu fuses into one kernel. Inside autotuning(), a step seen
for the first time runs every candidate on random input of its shape, with its own weights, and compares the output with the
reference; a further step of this shape checks the selected candidate with its weights. The correct ones are timed as CUDA
graphs, as in serving. A candidate that raises, exceeds the error limit or cannot be captured is disabled, with the reason.
Selections can be stored in a file and reused by later processes. A kernel that hangs ends only with the process: the candidate
is reported, and stored as one that later processes disable.
"""

import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from dinat.model.attention import compiled
from dinat.model.attention.reference import reference_attention
from dinat.model.attention.selection_files import Selection, read_hung, read_selections, write_hung, write_selections
from dinat.model.attention.timing import seconds, seconds_on_gpu
from dinat.model.errors import AttentionError

TRIAL_SECONDS = 300
"""Time to compile and check, or to time, one candidate: seconds where it works. After that it hangs."""
MAX_ERROR = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 1e-2}
"""Largest allowed error of a candidate by dtype, relative to the norm of the reference output."""
FALLBACKS = ("tiled", "reference")
"""See Step.fallbacks."""


class Key(Protocol):
    """Properties of a step that determine the speed of its candidates, for example LayerKey. A frozen dataclass."""

    @property
    def kind(self) -> str:
        """What the step computes, such as "attention"."""

    @property
    def device(self) -> str:
        """Device, as torch names it."""

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the step's input and output."""

    @property
    def requested_backend(self) -> str:
        """Implementation that the user requested, or "auto"."""

    @property
    def is_single(self) -> bool:
        """Whether the batch has one image, which leaves most of a GPU idle."""


@dataclass(frozen=True)
class Step:
    """A step of a network, and its implementations.

    Attributes:
        key: What its speed depends on.
        names: Candidates; the first one is used without autotuning.
        fallbacks: Candidates used when all others are disabled; the last one is not checked, because it is the reference.
        run: Computes the step by a candidate's name, on the input that the candidates are timed with.
        relative_error: Returns a candidate's error against the reference.
        weights: The weights that the error depends on, compared by identity.
    """

    key: Key
    names: Sequence[str]
    fallbacks: Sequence[str]
    run: Callable[[str], Tensor]
    relative_error: Callable[[str], float]
    weights: Hashable


OnHang = Callable[[str, bool], None]
"""Called with a sentence about a candidate that hangs, and whether later processes will disable it. In a thread of its own."""
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

    kind: ClassVar[str] = "attention"

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


def file_key(key: Any) -> str:
    """Return the key in a file of selections. It omits the device, because each GPU model has its own file."""
    return repr((key.kind, *(value for name, value in asdict(key).items() if name != "device")))


selections: dict[Key, Selection] = {}
"""Selections made in this process."""


def candidates(device: torch.device, dtype: torch.dtype, head_dim: int, requested_backend: str = "auto") -> list[str]:
    """Return the names of the candidates for a layer; the first one is used without autotuning.

    A candidate is a backend, or "triton" and one of its tile configurations, or "natten" and one of NATTEN's backends.
    """
    if requested_backend == "auto" and device.type != "cuda":
        return ["compiled", "tiled"] if compiled.supports_heads(dtype, head_dim) else ["tiled"]
    backends = [requested_backend]
    if requested_backend == "auto":
        backends = [*installed_backends(), "tiled"] if dtype in MAX_ERROR and has_kernels(device) else ["tiled"]
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
def installed_backends() -> list[str]:
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
def autotuning(check: bool = True, file: Path | None = None, on_hang: OnHang | None = None) -> Iterator[None]:
    """Autotune each layer that is seen for the first time inside this context. For one thread at a time.

    Args:
        check: Whether to compare candidates with the reference before timing them.
        file: Stored selections, which are read and updated; it need not exist. Of a stored selection, only the selected
            candidate is checked again.
        on_hang: Receives a candidate that takes longer than TRIAL_SECONDS.
    """
    global _session
    _session = session = _Session(check, read_selections(file), file, on_hang, read_hung(file))
    try:
        yield
        if file is not None:
            with suppress(OSError):  # without a file, the next process tunes again
                write_selections(file, {file_key(key): selection for key, selection in session.selected.items()})
    finally:
        _session = None


@dataclass(frozen=True)
class _Session:
    """Autotuning in progress.

    Attributes:
        stored: Selections from the file, by file_key.
        file: See autotuning.
        on_hang: See autotuning.
        hung: Candidates that hung in an earlier process, by kind of step and name, with the reason.
        selected: Selections made or checked, all of one device.
        errors: Relative error by step (of a batch larger than 1), its weights, and candidate. The weights are held, so that
            no others are created at their address.
    """

    check: bool
    stored: dict[str, Selection]
    file: Path | None
    on_hang: OnHang | None
    hung: dict[str, str]
    selected: dict[Key, Selection] = field(default_factory=dict)
    errors: dict[tuple[Key, Hashable, str], float] = field(default_factory=dict)

    def relative_error(self, step: Step, name: str) -> float:
        """Return the error of a step's candidate, measured once."""
        key = with_batch(step.key, is_single=False), step.weights, name
        if key not in self.errors:
            with self.trial(step, name):
                self.errors[key] = step.relative_error(name)
        return self.errors[key]

    @contextmanager
    def trial(self, step: Step, name: str) -> Iterator[None]:
        """Report the candidate if this context is not left within TRIAL_SECONDS."""
        if self.on_hang is None:
            yield
            return
        timer = threading.Timer(TRIAL_SECONDS, self._report, [self.on_hang, step.key, name])
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def _report(self, on_hang: OnHang, key: Key, name: str) -> None:
        why = f"it did not return within {TRIAL_SECONDS:g} s for {key}"
        is_stored = write_hung(self.file, {f"{key.kind} {name}": why})
        on_hang(f"{key.kind} {name}: {why}", is_stored)


_session: _Session | None = None
_failed: set[tuple[str, str, str]] = set()
"""Device, kind of step, and name of candidates that were disabled for some step."""


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
    check = _ErrorCheck(layer, attend, rpb)

    def run(name: str) -> Tensor:
        return attend(name, q, k, v, rpb)

    return select(Step(layer, names, FALLBACKS, run, check.relative_error, rpb))


def is_autotuning() -> bool:
    """Return whether this is inside autotuning()."""
    return _session is not None


def select(step: Step) -> str:
    """Return the candidate for a step.

    This is the step's existing selection; inside autotuning() the fastest correct candidate; otherwise the first of its names
    that was not disabled for another step of this kind.
    """
    key = step.key
    selection = selections.get(key)
    if _session is not None:
        selection = selections[key] = _session.selected[key] = _autotune(_session, step, selection)
        _failed.update((key.device, key.kind, name) for name in selection.disabled)
    selection = selection or selections.get(with_batch(key, not key.is_single))
    if selection is not None:
        return selection.backend
    enabled = (name for name in (*step.names, *step.fallbacks) if (key.device, key.kind, name) not in _failed)
    return next(enabled, step.fallbacks[-1])


def forget_disabled(device: str) -> None:
    """Forget what was disabled on a device, and the selections among the rest, after a batch that did not fit into memory.

    Candidates that ran out of memory may support a smaller batch.
    """
    for key in [key for key, selection in selections.items() if key.device == device and selection.disabled]:
        del selections[key]
    _failed.difference_update([entry for entry in _failed if entry[0] == device])


def with_batch(key: Any, is_single: bool) -> Key:
    """Return the key of the same step for a batch of one image, or of several."""
    changed: Key = replace(key, is_single=is_single)
    return changed


def _autotune(session: _Session, step: Step, selection: Selection | None) -> Selection:
    """Return the selection of a step. `selection` is that of another one with this key, which may have other weights."""
    errors: dict[str, float] = {}
    hung = {name: session.hung.get(f"{step.key.kind} {name}") for name in (*step.names, *step.fallbacks[:-1])}
    disabled = {name: f"{why}, at an earlier start" for name, why in hung.items() if why is not None}
    disabled |= selection.disabled if selection is not None else {}

    def is_correct(name: str) -> bool:
        if name in disabled:
            return False
        try:
            if session.check and name != step.fallbacks[-1]:
                errors[name] = session.relative_error(step, name)
                limit = MAX_ERROR[step.key.dtype]
                if not errors[name] <= limit:
                    disabled[name] = f"relative error {errors[name]:.2g} exceeds the limit of {limit:g}"
        except AttentionError as error:  # the backend does not support this layer
            if step.key.requested_backend == "auto":
                return False
            disabled[name] = reason(error)
        except Exception as error:
            disabled[name] = reason(error)
        return name not in disabled

    if selection is not None and is_correct(selection.backend):
        return selection
    stored = session.stored.get(file_key(step.key)) if selection is None else None
    if stored is not None and stored.backend in (*step.names, *step.fallbacks) and is_correct(stored.backend):
        return stored
    for group in (step.names, *([fallback] for fallback in step.fallbacks)):
        times, failed = _time_candidates(session, [name for name in group if is_correct(name)], step)
        if times:
            return Selection(min(times, key=lambda name: times[name]), times, errors, disabled | failed)
        disabled |= failed
    return Selection(step.fallbacks[-1], {}, errors, disabled)


def _time_candidates(session: _Session, names: Sequence[str], step: Step) -> tuple[dict[str, float], dict[str, str]]:
    """Return the seconds of each candidate, and the reason for each that failed. If no CUDA graph works, time plain calls."""
    device = torch.device(step.key.device)
    failed: dict[str, str] = {}
    timers: list[Callable[[Callable[[], object], torch.device], float]] = [seconds]
    for timer in [seconds_on_gpu, *timers] if device.type == "cuda" else timers:
        times: dict[str, float] = {}
        for name in names:
            try:
                with session.trial(step, name):
                    times[name] = timer(lambda: step.run(name), device)  # noqa: B023
            except Exception as error:
                failed[name] = reason(error)
        if times:
            return times, {name: why for name, why in failed.items() if name not in times}
    return {}, failed


class _ErrorCheck:
    """Random input of a layer's shape, with a batch of 2, its bias table, and the reference output, computed on first use."""

    def __init__(self, layer: LayerKey, attend: Attend, rpb: Tensor | None) -> None:
        self._layer, self._attend, self._rpb = layer, attend, rpb
        self._expected: Tensor | None = None

    def relative_error(self, name: str) -> float:
        """Return the norm of a candidate's error over the norm of the reference output; NaN if the candidate returns NaN."""
        layer = self._layer
        if self._expected is None:
            shape = (layer.height, layer.width, 3, layer.heads, layer.head_dim)
            self._qkv = random_images(shape, layer.dtype, torch.device(layer.device))
            self._expected = float64_reference(self._qkv, self._rpb, layer.kernel_size, layer.dilation, layer.scale)
        q, k, v = self._qkv.unbind(3)
        output = self._attend(name, q, k, v, self._rpb)
        return float((output.double() - self._expected).norm() / self._expected.norm())


def random_images(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return two images for the comparison of candidates: the same in each call, without the global generator."""
    return torch.randn(2, *shape, generator=torch.Generator(device).manual_seed(0), device=device).to(dtype)


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


def reason(error: BaseException) -> str:
    """Return an exception's type and message in one line of at most 200 characters."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
