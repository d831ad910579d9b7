"""Which backend a layer gets on a GPU: the fastest of those that are there and were seen to be right, found once per shape.

While trying() lasts, a layer met for the first time has every candidate compared with the definition, on random input of its
shape, and those that are right timed as CUDA graphs, the way they are served. What raises, is off, or cannot be captured is
left out, with the reason. What was found can be written to a file and remembered by a later process.
"""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
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
"""A candidate is timed in rounds, of so many calls each on a GPU."""
LIMITS = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 1e-2}
"""How far a candidate may be from the definition, as a share of the norm of what that gives."""
FALLBACKS = ("tiled", "reference")
"""What a layer gets where all that was to be tried is left out; the last one is the definition itself."""

Attend = Callable[[str, Tensor, Tensor, Tensor, Tensor | None], Tensor]
"""Attention of a layer by a candidate's name: q, k, v (B, H, W, heads, head_dim) and rpb to the output."""


@dataclass(frozen=True)
class LayerKey:
    """What speed and errors of a backend depend on, besides the batch. device: of torch.  asked: as the user has it."""

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
    asked: str = "auto"

    @classmethod
    def of(
        cls, q: Tensor, kernel_size: int, dilation: int, scale: float, has_rpb: bool = True, asked: str = "auto"
    ) -> "LayerKey":
        """The layer that asks with queries (B, H, W, heads, head_dim)."""
        height, width, heads, head_dim = q.shape[1:]
        return cls(str(q.device), q.dtype, height, width, heads, head_dim, kernel_size, dilation, scale, has_rpb, asked)

    def __str__(self) -> str:
        """The layer in words."""
        return f"{self.height}x{self.width} map, {self.heads} heads, kernel {self.kernel_size}, dilation {self.dilation}"

    @property
    def key(self) -> str:
        """A name for it in a file; of the card itself the file's own name speaks."""
        return repr((*(value for name, value in asdict(self).items() if name != "device"),))


@dataclass(frozen=True)
class Choice:
    """What a layer got. seconds and errors: of each candidate that has them;  disabled: the others, and why."""

    backend: str
    seconds: dict[str, float] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    disabled: dict[str, str] = field(default_factory=dict)


chosen: dict[LayerKey, Choice] = {}
"""What was chosen so far, in this process."""


def candidates(device: torch.device, dtype: torch.dtype, head_dim: int, asked: str = "auto") -> list[str]:
    """What may compute a layer, the one that is taken untried first. "triton" has a name for each of its cuts."""
    if asked == "auto" and device.type != "cuda":
        return ["compiled", "tiled"] if compiled.computes(dtype, head_dim) else ["tiled"]
    names = [asked]
    if asked == "auto":
        names = [*_libraries(), "tiled"] if dtype in LIMITS else ["tiled"]
    return [cut for name in names for cut in (_cuts(dtype, head_dim, asked) if name == "triton" else [name])]


def _cuts(dtype: torch.dtype, head_dim: int, asked: str) -> list[str]:
    from dinat.model.attention.triton_kernel import HEAD_DIMS, cuts

    return [f"triton {cut}" for cut in cuts(dtype, head_dim)] if head_dim in HEAD_DIMS or asked == "triton" else []


@cache
def _libraries() -> list[str]:
    """Those that are installed, and new enough to be imported."""
    modules = {"triton": "dinat.model.attention.triton_kernel", "natten": "natten"}
    return [name for name, module in modules.items() if find_spec(name) is not None and _is_importable(module)]


def _is_importable(module: str) -> bool:
    try:
        import_module(module)
    except Exception:
        return False
    return True


@contextmanager
def trying(check: bool = True, file: Path | None = None) -> Iterator[None]:
    """Within it, a layer met for the first time is tried with every candidate.

    check: compare with the definition first.  file: where choices are remembered; it need not be there. Of those only the
    kept candidate is compared again. For one thread at a time.
    """
    global _trial
    _trial = _Trial(check, _read(file))
    try:
        yield
        if file is not None:
            with suppress(OSError):  # what cannot be remembered is found again
                _write(file)
    finally:
        _trial = None


@dataclass(frozen=True)
class _Trial:
    check: bool
    remembered: dict[str, Choice]


_trial: _Trial | None = None
_distrusted: set[tuple[str, str]] = set()
"""Device and name of candidates that some layer left out."""


def choose(layer: LayerKey, names: Sequence[str], attend: Attend, q: Tensor, k: Tensor, v: Tensor, rpb: Tensor | None) -> str:
    """The candidate for a layer: the one kept, or, while trying, the fastest that is right, or else the first of `names`.

    attend: computes the layer by a candidate's name.  q, k, v, rpb: what it is timed with.
    """
    kept = chosen.get(layer)
    if kept is None and _trial is not None:
        kept = chosen[layer] = _decide(_trial, layer, names, attend, (q, k, v, rpb))
        _distrusted.update((layer.device, name) for name in kept.disabled)
    if kept is not None:
        return kept.backend
    trusted = (name for name in (*names, *FALLBACKS) if (layer.device, name) not in _distrusted)
    return next(trusted, FALLBACKS[-1])


def _decide(
    trial: _Trial, layer: LayerKey, names: Sequence[str], attend: Attend, inputs: tuple[Tensor, Tensor, Tensor, Tensor | None]
) -> Choice:
    errors: dict[str, float] = {}
    disabled: dict[str, str] = {}
    check = _Check(layer, attend)

    def is_right(name: str) -> bool:
        try:
            if trial.check and name != "reference":
                errors[name] = check.error(name)
                limit = LIMITS[layer.dtype]
                if not errors[name] <= limit:
                    disabled[name] = f"its numbers are {errors[name]:.2g} off the definition, {limit:g} is allowed"
        except AttentionError as error:  # it says itself that it has nothing for such a layer
            if layer.asked == "auto":
                return False
            disabled[name] = reason(error)
        except Exception as error:
            disabled[name] = reason(error)
        return name not in disabled

    remembered = trial.remembered.get(layer.key)
    if remembered is not None and remembered.backend in (*names, *FALLBACKS) and is_right(remembered.backend):
        return remembered
    for group in (names, *([fallback] for fallback in FALLBACKS)):
        right = [name for name in group if name not in disabled and is_right(name)]
        taken, failed = _timed(right, attend, inputs)
        if taken:
            return Choice(min(taken, key=lambda name: taken[name]), taken, errors, disabled | failed)
        disabled |= failed
    return Choice(FALLBACKS[-1], {}, errors, disabled)


def _timed(
    names: Sequence[str], attend: Attend, inputs: tuple[Tensor, Tensor, Tensor, Tensor | None]
) -> tuple[dict[str, float], dict[str, str]]:
    """Seconds of each, and what kept the others from it. Where none can be captured, as calls of their own."""
    q, k, v, rpb = inputs
    failed: dict[str, str] = {}
    clocks: list[Callable[[Callable[[], object], torch.device], float]] = [seconds]
    for clock in [seconds_on_gpu, *clocks] if q.device.type == "cuda" else clocks:
        taken: dict[str, float] = {}
        for name in names:
            try:
                taken[name] = clock(lambda: attend(name, q, k, v, rpb), q.device)  # noqa: B023
            except Exception as error:
                failed[name] = reason(error)
        if taken:
            return taken, {name: why for name, why in failed.items() if name not in taken}
    return {}, failed


class _Check:
    """Random input of a layer's shape, two pictures of it, and what the definition makes of it."""

    def __init__(self, layer: LayerKey, attend: Attend) -> None:
        self._layer, self._attend = layer, attend
        self._expected: Tensor | None = None

    def error(self, name: str) -> float:
        """How far a candidate is from the definition, as a share of its norm; NaN where it gives that."""
        layer = self._layer
        if self._expected is None:
            shape = (2, layer.height, layer.width, 3, layer.heads, layer.head_dim)
            side = 2 * layer.kernel_size - 1
            self._qkv = torch.randn(shape, device=layer.device).to(layer.dtype)
            self._rpb = torch.randn(layer.heads, side, side, device=layer.device).to(layer.dtype) if layer.has_rpb else None
            self._expected = definition(self._qkv, self._rpb, layer.kernel_size, layer.dilation, layer.scale)
        q, k, v = self._qkv.unbind(3)
        got = self._attend(name, q, k, v, self._rpb)
        return float((got.double() - self._expected).norm() / self._expected.norm())


def definition(qkv: Tensor, rpb: Tensor | None, kernel_size: int, dilation: int, scale: float) -> Tensor:
    """Attention by its definition in float64, head by head, which takes the least memory.

    qkv: (B, H, W, 3, heads, head_dim);  rpb: (heads, 2k-1, 2k-1).  Returns (B, H, W, heads, head_dim) float64.
    """
    heads = []
    for head in range(qkv.shape[4]):
        q, k, v = qkv[..., head : head + 1, :].double().unbind(3)
        bias = None if rpb is None else rpb[head : head + 1].double()
        heads.append(reference_attention(q, k, v, bias, kernel_size, dilation, scale)[0])
    return torch.cat(heads, dim=3)


def reason(error: Exception) -> str:
    """An error in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """Median seconds of a call."""

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
    """Median seconds of a call as part of a CUDA graph, after one call outside it."""
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


def _read(file: Path | None) -> dict[str, Choice]:
    """What a file remembers; nothing if it is not there or cannot be read."""
    try:
        rows = json.loads(file.read_text()) if file is not None else {}
        return {str(key): Choice(**row) for key, row in rows.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _write(file: Path) -> None:
    """Add what was chosen to a file: whole or not at all."""
    rows = _read(file) | {layer.key: kept for layer, kept in chosen.items() if not kept.disabled}  # which may be mended
    file.parent.mkdir(parents=True, exist_ok=True)
    beside = file.with_suffix(f".{time.monotonic_ns()}")
    beside.write_text(json.dumps({key: asdict(kept) for key, kept in rows.items()}, indent=1))
    beside.replace(file)
