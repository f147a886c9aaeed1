"""PyTorch's private names, each behind a function that says what stops working without it.

``tests/recording/test_torch_internals.py`` calls each of them: a PyTorch that drops one fails there
first, by name.
"""

from __future__ import annotations

import ctypes
import sys
import weakref
from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch._C._dynamo.eval_frame import _FrameAction, _FrameExecStrategy, set_code_exec_strategy
from torch._C._dynamo.guards import TensorGuards
from torch._higher_order_ops.effects import _EffectType, _register_effectful_op
from torch.amp import GradScaler
from torch.autograd.graph import Node
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

Function = TypeVar("Function", bound=Callable[..., Any])

_RELAXED = 2  # cudaStreamCaptureModeRelaxed

# All batch and instance norms: where their units are is known from it.
BATCH_NORM = nn.modules.batchnorm._NormBase


def leave_uncompiled(function: Function) -> Function:
    """Keep a hook and what it calls out of compiled graphs: else torch.compile breaks at it."""
    # `torch._dynamo.disable`, the public name, imports the compiler with gradstat, and its switch
    # takes longer than most hooks. This costs a call nothing.
    function._torchdynamo_disable = True  # type: ignore[attr-defined]  # where it would be traced
    # Where frames are compiled as they begin to run.
    as_it_is = _FrameExecStrategy(_FrameAction.SKIP, _FrameAction.SKIP)
    set_code_exec_strategy(function.__code__, as_it_is)
    return function


def is_capturing() -> bool:
    """Whether what runs now becomes part of a CUDA graph, and runs when that is replayed."""
    # It is asked for at each pass, so it must cost next to nothing where nobody uses CUDA.
    cuda = torch.cuda
    return cuda._initialized and cuda.is_initialized() and cuda.is_current_stream_capturing()  # type: ignore[no-untyped-call]


# Number of the backward pass of this thread, -1 outside: a scale is taken once in each.
running_pass: Callable[[], int] = torch._C._current_graph_task_id

# The node of a graph whose backward runs in this thread: tells checkpoints from other code.
running_node: Callable[[], Node | None] = torch._C._current_autograd_node

# The current stream of a CUDA device, as CUDA's own number; asking for it takes little.
raw_stream: Callable[[int], int] = getattr(torch._C, "_cuda_getCurrentRawStream", lambda _: 0)

# Has autograd call a function when the running pass ends; without it no pass has a record.
call_at_end_of_backward: Callable[[Callable[[], None]], None] = (
    torch.autograd.Variable._execution_engine.queue_callback
)


# The tensor that another is a view of: it keeps a hook when the view is changed in place.
base_of: Callable[[Tensor], Tensor | None] = attrgetter("_base")


def bequeath(name: str, value: object) -> None:
    """Let all hooks of the passes that this thread will call read a value, in whatever thread."""
    # Without it a pass that fails in a device's own thread may be noticed late.
    torch._C._stash_obj_in_tls(name, value)


def inherited(name: str) -> object:
    """A value that the caller of the running pass has bequeathed; ``None`` without one."""
    return torch._C._get_obj_in_tls(name) if torch._C._is_key_in_tls(name) else None


def capturing_graph() -> object:
    """The `torch.cuda.CUDAGraph` that is being captured: its passes are told from another one's."""
    # Without it passes are of one graph until one is replayed, or a pass runs outside a graph, and
    # ``Watch.replayed`` can be told of no other graph than the newest.
    graphs = torch.cuda.CUDAGraph
    graph: object = getattr(graphs, "get_currently_capturing_graph", lambda: graphs)()
    return graph


def _exchange_capture_mode() -> Callable[..., object]:
    """The runtime's own function, which PyTorch has for C++ alone; else one that does nothing."""
    name = f"{'hip' if torch.version.hip else 'cuda'}ThreadExchangeStreamCaptureMode"
    found = None if sys.platform == "win32" else getattr(ctypes.PyDLL(None), name, None)
    return found or (lambda _: None)


class SparingCaptures:
    """A context in which this thread may ask the device while any thread captures a CUDA graph."""

    # Without it, as on Windows, a query breaks a capture of this thread, and one of another thread
    # in PyTorch's default mode.

    __slots__ = ("_mode",)
    _exchange: ClassVar = staticmethod(_exchange_capture_mode())

    def __init__(self) -> None:
        is_initialized: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
        self._mode = ctypes.c_int(_RELAXED) if is_initialized else None

    def __enter__(self) -> None:
        if self._mode is not None:
            self._exchange(ctypes.byref(self._mode))

    def __exit__(self, *_: object) -> None:
        if self._mode is not None:
            self._exchange(ctypes.byref(self._mode))


def call_after_replays(graph: object, method: Callable[[], None]) -> None:
    """Have a method called after each launch of a CUDA graph, as long as its object lives."""
    # Without it ``Watch.replayed`` must be called on the stream of the replay.
    register = getattr(graph, "register_replay_end_hook", None)
    if register is None or isinstance(graph, type):
        return
    reference = weakref.WeakMethod(method)

    def hook(_: object) -> None:
        call = reference()
        if call is None:
            handle.remove()
        else:
            call()

    handle = register(hook)


def is_compiled_autograd() -> bool:
    """Whether compiled autograd runs, which tells nobody of its end: an error says so."""
    module = sys.modules.get("torch._dynamo.compiled_autograd")
    return module is not None and bool(module.in_compiled_autograd_region)


def scale_of(scaler: GradScaler | None) -> Tensor | None:
    """A scaler's scale, 0-dim; ``None`` before its first loss: gradients are unscaled by it."""
    # ``get_scale()``, the public name, waits for the device.
    scale: Tensor | None = getattr(scaler, "_scale", None)
    return scale


def unwrapped(optimizer: Optimizer) -> Optimizer:
    """The optimizer whose hooks are called: accelerate's wrapper of one has no hooks of its own."""
    while not hasattr(optimizer, "_optimizer_step_pre_hooks"):
        inner = getattr(optimizer, "optimizer", None)
        if not isinstance(inner, Optimizer):
            raise TypeError(
                f"watch() needs an optimizer that has step hooks; optimizer is "
                f"{type(optimizer).__name__}, which has none and wraps none"
            )
        optimizer = inner
    return optimizer


def step_states_of(scaler: GradScaler | None) -> dict[int, object] | None:
    """A scaler's states of this iteration, by optimizer's id: they tell of steps that it skips."""
    states: dict[int, object] | None = getattr(scaler, "_per_optimizer_states", None)
    return states


def is_transformed(x: Tensor) -> bool:
    """Whether a tensor belongs to a transform of torch.func, and has no values of its own."""
    functorch = torch._C._functorch
    return functorch.is_functorch_wrapped_tensor(x) or functorch.is_legacy_batchedtensor(x)


def saved_tensor_hook() -> Callable[..., Any] | None:
    """The innermost hook on saved tensors: a checkpoint that recomputes is known by its own."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return None if hooks is None else hooks[0]


def multiplied(tensors: list[Tensor], factor: Tensor) -> list[Tensor]:
    """Copies of tensors times a 0-dim one, in few launches: unscaling for linear bins needs it."""
    return list(torch._foreach_mul(tensors, factor))


def hooks_on_gradient(parameter: Tensor) -> list[Callable[..., None]]:
    """The hooks that see a parameter's gradient when it has been accumulated."""
    hooks: dict[int, Callable[..., None]] | None = parameter._post_accumulate_grad_hooks
    return [*(hooks or {}).values()]


def run_first(parameter: Tensor, handle: RemovableHandle) -> None:
    """Move a hook on a parameter's gradient before the others, which may change it."""
    hooks: dict[int, Callable[..., None]] = parameter._post_accumulate_grad_hooks
    others = [key for key in hooks if key != handle.id]
    # PyTorch takes them in the order of insertion, not in that of OrderedDict.move_to_end(). In one
    # call, in which an interrupt cannot lose one.
    list(map(hooks.__setitem__, others, map(hooks.pop, others)))


def alike(tensors: Sequence[Tensor]) -> Callable[..., bool]:
    """What says of as many others whether they are like these in all but addresses and values."""
    # It compares types, dtypes, sizes, strides, devices, layouts and signs that torch keeps apart,
    # in one call. Of a tensor that comes twice it says no.
    guards = TensorGuards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None)
    check: Callable[..., bool] = guards.check
    return check


def name_of_wrapped(module: nn.Module) -> str | None:
    """Under which name a wrapper has the user's own module; ``None`` of any other module."""
    # Without it a layer has another name where it is compiled, and the mode that the user sets is
    # not that of the wrapper.
    if isinstance(module, DistributedDataParallel | nn.DataParallel):
        return "module"
    # Of torch.compile, of checkpoint_wrapper, and of the first FSDP.
    names = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
    children = {name for name, _ in module.named_children()}
    return next((name for name in names if name in children), None)


def keep_in_graphs(op: Any) -> None:  # noqa: ANN401 (an overload of torch.ops, which has no public type)
    """Have compilers keep calls of an op that returns nothing: else they drop compiled hooks."""
    _register_effectful_op(op, _EffectType.ORDERED)


def has_compiled() -> bool:
    """Whether torch.compile has compiled anything: then gradients arrive in no order of layers."""
    utils = sys.modules.get("torch._dynamo.utils")
    return utils is not None and utils.counters["stats"]["unique_graphs"] > 0


def default_store() -> Any | None:  # noqa: ANN401 (has no public type)
    """What ranks tell each other by name: else those of two runs in a directory pass for one."""
    get = getattr(dist.distributed_c10d, "_get_default_store", None)
    return None if get is None else get()
