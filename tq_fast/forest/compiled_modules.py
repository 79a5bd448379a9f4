"""Norms, MLPs and rotary embeddings as `torch.compile` makes them: few kernels in place of many.

With few rows, a pass on a GPU spends much of its time between the matrix products, in small
kernels. In 16 bits a norm of Llama's is eight tensor operations, the rotation of queries and keys
ten, and an MLP two between its products. `torch.compile` fuses them. It is told to round where the
modules round between two operations (`emulate_precision_casts`), so that 16-bit results are as a
rule the same bit for bit.

On a CPU the option is there to be tested: what is saved in operations is spent on PyTorch's checks
whether compiled code fits, a tenth of a pass of one row in a Llama of 134 M parameters. In the CUDA
graphs of a forest nothing is checked.

Everything is recognised by trying. A module that could be a norm or an MLP by its parameters runs
compiled if the compiled forward gives what the module gives on a few random states. Rotary
embeddings are no modules: the forward of an attention layer calls a function of its modeling file,
which transformers names `apply_rotary_pos_emb` throughout. In the view, the same forward runs over
globals in which a compiled function has this name; it is tried on the first queries and keys that
come. What is left as it is is told of once. The sums with the residual stay kernels of their own:
they stand in the decoder layer's forward between calls that cannot be part of one graph.

Compiled code takes rows `[N, D]`, whatever the shape of the states, because PyTorch compiles anew
where a size is 1: so there are two compilations of each kind of module, for one row and for
several, both made in the trial.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import types
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Sequence, Set
from typing import Any, NamedTuple, TypeAlias

import torch
import torch._dynamo
from torch import nn
from transformers import PreTrainedModel

from ..errors import BackendRefused, warn_caller
from .fused_layers import is_watched
from .trials import is_close
from .view import is_adapted, seen_modules

# The name of rotary functions in the modeling files of transformers.
_ROTARY = "apply_rotary_pos_emb"
# A step is captured by the forest, together with what is not compiled.
_OPTIONS: dict[str, Any] = {"emulate_precision_casts": True, "triton.cudagraphs": False}

_Function: TypeAlias = Callable[..., Any]

_DISAGREES = "compute something else compiled, by a trial on a few states"
_NOT_ONE_GRAPH = "cannot be compiled as one graph"
_ALL_DIFFERENT = "would each be compiled anew"


class _Kind(NamedTuple):
    """What compiled code is made for; modules of one kind share it, whatever model they are in."""

    forward: _Function
    # Shape, dtype, device and requires_grad of each.
    weights: tuple[tuple[torch.Size, torch.dtype, torch.device, bool], ...]
    # PyTorch compiles anew for another number.
    num_threads: int


_compiled: dict[_Kind, _Function] = {}
# For modules of users' models: the kind that was tried, and why it stays as it is, or None.
_verdicts: weakref.WeakKeyDictionary[nn.Module, tuple[_Kind, str | None]] = (
    weakref.WeakKeyDictionary()
)
# Models whose modules were told of.
_warned: weakref.WeakSet[nn.Module] = weakref.WeakSet()


@dataclasses.dataclass(frozen=True)
class CompiledModules:
    """What runs compiled in a view.

    Attributes:
        num_compiled: norms and MLPs that do.
        num_rotary: attention layers whose rotary embedding is compiled when it is first called.
        reasons: for norms and MLPs that run as they are, each reason with the number of modules.
    """

    num_compiled: int
    num_rotary: int
    reasons: Counter[str]

    def __str__(self) -> str:
        total = self.num_compiled + self.reasons.total()
        text = (
            f"{self.num_compiled} of {total} norms and MLPs run compiled, and the rotary embedding "
            f"of {self.num_rotary} attention layers"
        )
        others = [f"{count} {reason}" for reason, count in self.reasons.most_common()]
        return f"{text} ({'; '.join(others)})" if others else text


def compile_modules(
    view: PreTrainedModel, source: PreTrainedModel, taken: Set[nn.Module] = frozenset()
) -> CompiledModules:
    """Have the norms, MLPs and rotary embeddings of `view` run compiled, where they agree.

    Args:
        view: a view of `source`, which is not changed itself.
        source: the model as the user has it.
        taken: modules of the view with which something else is done. They are left alone, and so
            are norms and MLPs that they are part of.

    Raises:
        BackendRefused: nothing can be compiled, for want of a C++ compiler or of Triton. Whoever
            asks for compiled code is not served by the same numbers at the old pace.
    """
    found, num_compiled, inside = Counter[str](), 0, set[nn.Module]()
    for module, original in zip(list(view.modules()), seen_modules(source), strict=True):
        shapes = _shapes_of_states(module, source)
        if shapes is None or module in inside or taken & set(module.modules()):
            continue
        reason = _refusal(module)
        if reason is None:
            kind = _kind_of(module)
            forward = _forward_of(module, kind)
            if _verdicts.get(original, (None, None))[0] != kind:
                _verdicts[original] = kind, _why_plain(module, kind, shapes)
            reason = _verdicts[original][1]
        if reason is None:
            module.__dict__["forward"] = forward
            inside.update(module.modules())
            num_compiled += 1
        else:
            found[reason] += 1
    num_rotary = _compile_rotary(module for module in view.modules() if module not in taken)
    compiled = CompiledModules(num_compiled, num_rotary, found)
    if found and source not in _warned:
        _warned.add(source)
        warn_caller(f"{type(source).__name__}: {compiled}; the others run as they are")
    return compiled


def _shapes_of_states(module: nn.Module, source: PreTrainedModel) -> list[tuple[int, ...]] | None:
    """Shapes of states that `module` could take; None where it is neither a norm nor an MLP."""
    num_parts, weights = len(list(module.modules())), list(module.parameters())
    # The modules of PyTorch are as few kernels as they can be.
    is_built_in = type(module).__module__.split(".")[0] == "torch"
    if is_built_in or not weights or len(_parameters_of(type(module).forward)) != 1:
        return None
    dims = {weight.dim() for weight in weights}
    if num_parts == 1 and dims == {1}:
        size = weights[0].shape[0]
        return [(2, 3, size), (1, 1, size), (2, 3, 2, size)]
    num_matrices = sum(weight.dim() == 2 for weight in weights)
    if num_parts > 1 and dims <= {1, 2} and num_matrices > 1:
        size = source.config.get_text_config().hidden_size
        return [(2, 3, size), (1, 1, size)]
    return None


def _refusal(module: nn.Module) -> str | None:
    """Why nothing may stand in for `module`, by what was done to it; None: it is to be tried."""
    if any(is_watched(part) or is_adapted(part) for part in module.modules()):
        return "have hooks, adapters or a forward of their own"
    if any(type(weight) is not nn.Parameter or weight.is_meta for weight in module.parameters()):
        return "have weights that are quantised, or lie elsewhere"
    return None


@functools.cache
def _parameters_of(forward: Callable[..., Any]) -> tuple[str, ...]:
    """Names of what `forward` of a module takes."""
    return tuple(inspect.signature(forward).parameters)[1:]


def _kind_of(module: nn.Module) -> _Kind:
    weights = [
        (weight.shape, weight.dtype, weight.device, weight.requires_grad)
        for weight in module.parameters()
    ]
    return _Kind(type(module).forward, tuple(weights), torch.get_num_threads())


def _compile(function: Callable[..., Any]) -> _Function:
    """Return compiled `function`, whose compilations are counted apart from all others."""
    assert isinstance(function, types.FunctionType)
    # PyTorch gives up on a code object that it has compiled eight times.
    own = _with_code(function, function.__code__.replace(), function.__globals__)
    # Only sizes that are marked are open: otherwise PyTorch opens those by which kinds differ, too.
    compiled: _Function = torch.compile(own, fullgraph=True, dynamic=False, options=_OPTIONS)
    return compiled


def _with_code(
    function: types.FunctionType, code: types.CodeType, names: dict[str, Any]
) -> types.FunctionType:
    """Return a copy of `function` with other code and other globals."""
    made = types.FunctionType(
        code, names, function.__name__, function.__defaults__, function.__closure__
    )
    made.__kwdefaults__ = function.__kwdefaults__
    return made


def _forward_of(module: nn.Module, kind: _Kind) -> _Function:
    """What stands in for the forward of `module`."""
    if kind not in _compiled:
        _compiled[kind] = _compile(kind.forward)
    run = _compiled[kind]
    (name,) = _parameters_of(kind.forward)
    # The module holds its forward: one that held the module would be part of a circle.
    reference = weakref.ref(module)

    def forward(*args: torch.Tensor, **kwargs: torch.Tensor) -> torch.Tensor:
        states = args[0] if args else kwargs[name]
        # Heads before tokens `[n, H, T, d]` lie in memory as `[n, T, H, d]`, and stay so.
        is_turned = states.dim() == 4 and not states.is_contiguous()
        laid_out = states.transpose(1, 2) if is_turned else states
        rows = laid_out.reshape(-1, states.shape[-1]).contiguous()
        result: torch.Tensor = run(reference(), rows).view(laid_out.shape)
        return result.transpose(1, 2) if is_turned else result

    return forward


@torch.no_grad()
def _why_plain(module: nn.Module, kind: _Kind, shapes: list[tuple[int, ...]]) -> str | None:
    """Why `module` stays as it is, by a trial on random states of these shapes; None: it need not.

    The trial is what compiles, and the tolerance is that of fused layers.
    """
    weight = next(module.parameters())
    generator = torch.Generator().manual_seed(0)
    trials = []
    for shape in shapes:
        states = torch.randn(shape, generator=generator, dtype=torch.float32)
        # Small states show what is added to them, large ones a bound.
        states[0] *= 0.05
        states[-1] *= 8.0
        trials.append(states.to(weight))
    try:
        truths = [module.forward(states) for states in trials]
    except torch.OutOfMemoryError:
        raise
    except Exception:
        return "take other states than the model's"
    run, forward = _compiled[kind], _forward_of(module, kind)
    rows = trials[0].flatten(0, -2)
    results = _try_compiled(
        type(module).__name__,
        lambda: [run(module, _open_size(rows, 0)), *map(forward, trials)],
    )
    if isinstance(results, str):
        return results
    agree = all(map(is_close, results[1:], truths))
    return None if agree else _DISAGREES


def _open_size(part: torch.Tensor, dim: int) -> torch.Tensor:
    """Have what is compiled with `part` take any size along `dim` but 1."""
    if part.shape[dim] > 1:
        torch._dynamo.mark_dynamic(part, dim)
    return part


def _try_compiled(name: str, run: Callable[[], Any]) -> Any:
    """Return what `run` returns, or why it cannot run compiled, from its own code.

    Raises:
        BackendRefused: PyTorch finds a graph in the code, but cannot compile it.
    """
    try:
        return run()
    except torch.OutOfMemoryError:
        raise
    except (torch._dynamo.exc.Unsupported, torch._dynamo.exc.UserError):
        return _NOT_ONE_GRAPH
    except torch._dynamo.exc.FailOnRecompileLimitHit:
        return _ALL_DIFFERENT
    except Exception as error:
        raise BackendRefused(
            f"speed.compiled_modules=True: torch.compile failed at {name}. It needs a C++ "
            f"compiler, and Triton on a GPU; leave the option off where they are missing: {error}"
        ) from error


def _compile_rotary(modules: Iterable[nn.Module]) -> int:
    """Have the attention layers among `modules` rotate by compiled functions; return how many."""
    own: dict[Any, types.FunctionType] = {}
    count = 0
    for module in modules:
        # Some releases wrap it, to take arguments by earlier names.
        forward = inspect.unwrap(type(module).forward)
        if not isinstance(forward, types.FunctionType) or is_watched(module):
            continue
        rotary = forward.__globals__.get(_ROTARY)
        is_called = _ROTARY in forward.__code__.co_names
        if not is_called or not isinstance(rotary, types.FunctionType):
            continue
        if forward not in own:
            names = {**forward.__globals__, _ROTARY: _rotary_of(rotary)}
            own[forward] = _with_code(forward, forward.__code__, names)
        module.__dict__["forward"] = _bound(own[forward], weakref.ref(module))
        count += 1
    return count


def _bound(function: types.FunctionType, reference: weakref.ref[nn.Module]) -> _Function:
    def forward(*args: Any, **kwargs: Any) -> Any:
        return function(reference(), *args, **kwargs)

    return forward


@functools.cache
def _rotary_of(function: types.FunctionType) -> _Rotary:
    return _Rotary(function)


class _Rotary:
    """A rotary function of a modeling file, compiled where it gives the same.

    Called as that with queries `[n, H, T, d]`, keys `[n, H_kv, T, d]` and the cosines and sines
    `[n, T, r]`, it takes all n x T tokens for tokens of one text, which is the same where a token
    is rotated by its own angles. Other calls go to the function itself.
    """

    def __init__(self, function: types.FunctionType) -> None:
        self._function = function
        # By sizes, strides, dtypes and devices; None where the function itself is to be called.
        self._compiled: dict[Any, _Function | None] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        flat = None if kwargs else _in_one_text(args)
        run = None
        if flat is not None:
            parts = [
                (part.shape[1], part.shape[3], part.stride(2), part.dtype, part.device)
                for part in flat[:2]
            ]
            angles = (flat[2].shape[2], flat[2].dtype, flat[2].device)
            kind = (*parts, angles, flat[0].shape[2] == 1, torch.get_num_threads())
            if kind not in self._compiled:
                self._compiled[kind] = self._try(args, flat)
            run = self._compiled[kind]
        result: tuple[torch.Tensor, torch.Tensor]
        if flat is None or run is None:
            result = self._function(*args, **kwargs)
        else:
            result = _in_rows(run(*flat), args[0].shape[0], args[0].shape[2])
        return result

    @torch.no_grad()
    def _try(self, args: Sequence[torch.Tensor], flat: Sequence[torch.Tensor]) -> _Function | None:
        """Return compiled code for such arguments; None where it gives something else."""
        run = _compile(self._function)
        truths = self._function(*args), self._function(*_one_a_row(flat))
        for part, dim in zip(flat, (2, 2, 1, 1), strict=True):
            _open_size(part, dim)
        name = f"{self._function.__module__}.{self._function.__name__}"
        result = _try_compiled(name, lambda: run(*flat))
        if not isinstance(result, str):
            sizes = (args[0].shape[0], args[0].shape[2]), (flat[0].shape[2], 1)
            results = (_in_rows(result, *size) for size in sizes)
            pairs = zip(results, truths, strict=True)
            if all(is_close(*parts) for pair in pairs for parts in zip(*pair, strict=True)):
                return run
        reason = result if isinstance(result, str) else _DISAGREES
        warn_caller(f"rotary embeddings ({name}) {reason}; they run as they are")
        return None


def _in_one_text(args: Sequence[Any]) -> tuple[torch.Tensor, ...] | None:
    """The arguments of a rotary function with the tokens of all rows in one row; None: no such."""
    if len(args) != 4 or args[0].dim() != 4 or args[1].dim() != 4:
        return None
    q, k, cos, sin = args
    if not cos.shape[:-1] == sin.shape[:-1] == (q.shape[0], q.shape[2]) == (k.shape[0], k.shape[2]):
        return None
    heads = [part.transpose(1, 2).flatten(0, 1) for part in (q, k)]
    # Only the distance of two tokens is left open, in matrices of which both are cut, say.
    heads = [part if part[0].is_contiguous() else part.contiguous() for part in heads]
    angles = [part.flatten(0, 1).contiguous()[None] for part in (cos, sin)]
    return *(part[None].transpose(1, 2) for part in heads), *angles


def _one_a_row(flat: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The arguments of a rotary function with each token of one row in a row of its own."""
    heads = [part.transpose(0, 2) for part in flat[:2]]
    return [*heads, *(part.transpose(0, 1) for part in flat[2:])]


def _in_rows(
    rotated: Sequence[torch.Tensor], num_rows: int, num_tokens: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotated queries and keys of one row in `num_rows` of `num_tokens` tokens each."""
    q, k = (
        part.transpose(1, 2).reshape(num_rows, num_tokens, part.shape[1], -1).transpose(1, 2)
        for part in rotated
    )
    return q, k
