"""ATen's operators on the device: CUDA's kernels are machine code, so the CPU's stand in.

A call is queued on the current stream like the kernel it stands for. It holds the addresses of its
tensors, not the tensors: nothing is kept alive that a GPU would not keep alive. Results come from
the caching allocator; their shapes are what the operator makes of `meta` tensors, which is found
once for each kind of arguments.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

from cuda_device import device, launches

# Host code of PyTorch that launches nothing by itself, and what only makes views or allocations.
NATIVE = """
empty.memory_format empty_strided as_strided view _reshape_alias unfold resize_ set_
set_.source_Storage set_.source_Storage_storage_offset set_.source_Tensor record_stream
_local_scalar_dense is_set_to _pin_memory pin_memory is_pinned _efficientzerotensor view_as_real
view_as_complex _cudnn_init_dropout_state _use_cudnn_ctc_loss set_data lift_fresh _cslt_compress
_assert_async _assert_async.msg _record_function_enter sym_size
""".split()
# Composite operators whose one kernel asks a table of stubs for the device's.
ALSO = """
copy_ convolution convolution_backward native_layer_norm native_layer_norm_backward _foreach_copy_
""".split()
# Operators on sparse tensors that are imitated; others are made of operators on their parts.
SPARSE = "_coalesce add.Tensor add_.Tensor mul.Tensor _to_dense".split()
SKIPPED = """
cudnn cufft miopen sparse mkldnn nested nccl cslt quantize flash efficient_attention
""".split()
CPU_KEYS = """
CPU CompositeExplicitAutograd CompositeExplicitAutogradNonFunctional CompositeImplicitAutograd
""".split()
MOST_POISONED_BYTES = 64 << 20
MOST_SHAPES = 4096  # that an operator remembers

imitated: list[str] = []
left_out: list[str] = []  # fail when they are called
_kept: list[Any] = []  # a library of operators lives as long as its object
_memory: dict[Any, Any] = {}  # all of the device's or of pinned memory, as a tensor of a dtype
torch: Any = None  # when it has been imported


def replace(module: Any) -> None:
    """Put the CPU's kernels in the places of CUDA's."""
    global torch
    torch = module
    library = torch.library.Library("aten", "IMPL")
    _kept.append(library)

    def register(name: str, kernel: Callable[..., Any], key: str = "CUDA") -> None:
        library.impl(name, kernel, key, with_keyset=True)
        not_traced(kernel)

    def cuda_kernel(name: str) -> Any:
        return torch.library.get_kernel(f"aten::{name}", "CUDA")

    registered = torch._C._dispatch_get_registrations_for_dispatch_key("CUDA")
    names = [name.removeprefix("aten::") for name in registered if name.startswith("aten::")]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        copy_kernel = cuda_kernel("copy_")
        for name in dict.fromkeys(names + ALSO):
            if name in NATIVE or name == "copy_":
                continue
            overload = find(name)
            if overload is None or any(word in name.split(".")[0] for word in SKIPPED):
                left_out.append(name)
            elif name == "_fused_sdp_choice":
                register(name, lambda keyset, *args, **kwargs: 0)
            elif not any(r.alias_info and not r.alias_info.is_write for r in returns_of(overload)):
                register(name, Operator(name, overload).call)  # the others make views
                imitated.append(name)
        for name in ("empty.memory_format", "empty_strided"):
            register(name, poisoned(cuda_kernel(name)))
        register("copy_", copy_of(copy_kernel))
        for name in SPARSE:
            register(name, sparse(name), "SparseCUDA")
    for function in (device._run, launches.load_module, launches.get_function, launches.launch):
        not_traced(function)
    torch.backends.cudnn.enabled = False
    for attention in ("flash", "mem_efficient", "cudnn"):  # leaves the one of plain operators
        getattr(torch._C, f"_set_sdp_use_{attention}")(False)


def find(name: str) -> Any:
    base, _, overload = name.partition(".")
    return getattr(getattr(torch.ops.aten, base, None), overload or "default", None)


def returns_of(overload: Any) -> list[Any]:
    return overload._schema.returns


def not_traced(function: Any) -> None:
    """Hide a frame from TorchDynamo: it and what it calls are PyTorch's inside."""
    with suppress(ImportError, AttributeError, TypeError):
        from torch._C._dynamo import eval_frame

        skip = eval_frame._FrameAction.SKIP
        strategy = eval_frame._FrameExecStrategy(skip, skip)
        eval_frame.set_code_exec_strategy(function.__code__, strategy)


class Alias:
    """A tensor of the device by its address."""

    __slots__ = ("address", "conj", "dtype", "neg", "size", "stride")

    def __init__(self, x: Any) -> None:
        self.address, self.dtype = x.data_ptr(), x.dtype
        self.size, self.stride = x.size(), x.stride()
        self.neg, self.conj = x.is_neg(), x.is_conj()

    def tensor(self) -> Any:
        """The same memory as a tensor of the CPU."""
        if not self.address:
            return torch.empty_strided(self.size, self.stride, dtype=self.dtype)
        start = device.PINNED if self.address >= device.PINNED else device.ARENA
        memory = _memory.get((start, self.dtype))
        if memory is None:
            n_bytes = device.ARENA_BYTES if start == device.ARENA else device.PINNED_BYTES
            raw = (ctypes.c_uint8 * n_bytes).from_address(start)
            memory = torch.frombuffer(raw, dtype=torch.uint8).view(self.dtype)
            _memory[start, self.dtype] = memory
        offset, rest = divmod(self.address - start, self.dtype.itemsize)
        assert rest == 0
        x = torch.as_strided(memory, self.size, self.stride, offset)
        if self.conj:
            x = x.conj()
        return torch._neg_view(x) if self.neg else x


@dataclass(frozen=True, slots=True)
class Like:
    """What a result is like."""

    size: Any
    stride: Any
    dtype: Any

    def new(self) -> Any:
        return torch.empty_strided(self.size, self.stride, dtype=self.dtype, device="cuda")


@contextmanager
def quiet() -> Iterator[None]:
    """Nothing sees what goes on in here: autograd, autocast, modes, those who count warnings."""
    autocast = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)
    with (
        torch._C._AutoDispatchBelowAutograd(),
        torch._C._DisableTorchDispatch(),
        torch._C._ExcludeDispatchKeyGuard(autocast),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        yield


def convert(x: Any, tensor: Callable[[Any], Any]) -> Any:
    """An argument with its tensors converted; what lies on the CUDA device comes to the CPU."""
    if isinstance(x, torch.Tensor):
        return tensor(x)
    if isinstance(x, (list, tuple)):
        return [convert(y, tensor) for y in x]
    if isinstance(x, torch.device) and x.type == "cuda":
        return torch.device("cpu")
    return x


def to_alias(x: Any) -> Any:
    # A tensor of the CPU among the arguments is a number: its value now.
    return Alias(x) if x.is_cuda else x.clone()


def to_cpu(x: Any) -> Any:
    return Alias(x).tensor() if x.is_cuda else x


def to_meta(x: Any) -> Any:
    y = torch.empty_strided(x.size(), x.stride(), dtype=x.dtype, device="meta")
    return torch._neg_view(y) if x.is_neg() else y


def to_zeros(x: Any) -> Any:
    return torch.zeros(x.shape, dtype=x.dtype) if x.is_cuda else x


def to_cuda(x: Any) -> Any:
    return x.to("cuda") if isinstance(x, torch.Tensor) else x


def resolve(x: Any) -> Any:
    if type(x) is Alias:
        return x.tensor()
    if type(x) is list:
        return [resolve(y) for y in x]
    return x


def like(x: Any) -> Any:
    return Like(x.size(), x.stride(), x.dtype) if isinstance(x, torch.Tensor) else x


def new(x: Any) -> Any:
    return x.new() if isinstance(x, Like) else x


def nested(x: Any, function: Callable[[Any], Any]) -> Any:
    """A result, or each of a list of them."""
    if isinstance(x, (list, tuple)):
        return [function(y) for y in x]
    return function(x)


def flat(x: Any) -> list[Any]:
    if isinstance(x, (list, tuple)):
        return [z for y in x for z in flat(y)]
    return [x]


def unpacked(results: list[Any]) -> Any:
    """As PyTorch returns them."""
    return tuple(results) if len(results) > 1 else results[0] if results else None


def kind(x: Any, is_number: bool) -> Any:
    """All of an argument that the shapes of results depend on."""
    if isinstance(x, torch.Tensor):
        return x.size(), x.stride(), x.dtype, x.is_cuda, x.is_neg()
    if isinstance(x, (list, tuple)):
        return tuple(kind(y, is_number) for y in x)
    if is_number:
        return type(x)
    return type(x), x


_drawn = itertools.count(1 << 30)


def next_seed(generator: Any) -> int:
    if generator is None:
        generator = torch.cuda.default_generators[0]
    if generator.device.type != "cuda":
        found = generator.device.type
        raise RuntimeError(f"Expected a 'cuda' device type for generator but found '{found}'")
    try:
        offset = generator.get_offset()
        generator.set_offset(offset + 4)
    except RuntimeError:  # in a capture
        offset = next(_drawn)
    return (generator.initial_seed() * 1_000_003 + offset) & ((1 << 62) - 1)


def wait(name: str) -> None:
    """What CUDA's kernel does where the host needs its result."""
    if torch.cuda.get_sync_debug_mode() == 2:
        raise RuntimeError(f"called a synchronizing CUDA operation ({name})")
    torch.cuda.current_stream().synchronize()


class Operator:
    """An operator of ATen: what is done at a call, and what is queued."""

    def __init__(self, name: str, overload: Any) -> None:
        schema = overload._schema
        self.name, self.overload, self.label = name, overload, str(overload)
        arguments = schema.arguments
        self.positional = [each.name for each in arguments if not each.kwarg_only]
        written = [each for each in arguments if each.alias_info and each.alias_info.is_write]
        self.outs = [each.name for each in arguments if each.is_out]
        self.tensors = [
            each.name for each in arguments if str(each.type) in ("Tensor", "Optional[Tensor]")
        ]
        # Where there are tensors, shapes do not depend on the values of numbers.
        has_tensors = any("Tensor" in str(each.type) for each in arguments)
        self.numbers = {
            each.name for each in arguments if has_tensors and "number" in str(each.type)
        }
        self.has_generator = any(each.name == "generator" for each in arguments)
        tags = torch.Tag
        self.is_random = self.has_generator or tags.nondeterministic_seeded in overload.tags
        # Shapes that depend on values.
        waiting = {tags.data_dependent_output, tags.dynamic_output_shape}
        self.waits = not waiting.isdisjoint(overload.tags)
        # For each result the argument that it is, or None.
        self.returned = []
        for each in schema.returns:
            before = each.alias_info.before_set if each.alias_info else None
            same = [w.name for w in written if before and w.alias_info.before_set == before]
            self.returned.append(same[0] if same else None)
        self.writes = bool(written)
        self.is_in_place = bool(written) and not self.outs and all(self.returned)
        self.shapes: dict[Any, Any] = {}
        self.cpu_kernel: Any = None

    def call(self, keyset: Any, *args: Any, **kwargs: Any) -> Any:
        device.operator_counts[self.label] += 1
        bound = dict(zip(self.positional, args, strict=False)) | kwargs
        if self.cpu_kernel is None:
            self.cpu_kernel = self.find_cpu_kernel()
        with quiet():
            if self.waits:
                return self.synchronous(bound)
            seed = next_seed(bound.get("generator")) if self.is_random else None
            if self.has_generator:
                bound["generator"] = None
            results = None
            if self.outs:
                if not self.resize_outs(bound):
                    return self.synchronous(bound)
            elif not self.is_in_place:
                results = [nested(x, new) for x in self.results_like(bound)]
            given = {name: convert(x, to_alias) for name, x in bound.items()}
            made = flat(results or [])
            targets = [Alias(x) for x in made if isinstance(x, torch.Tensor)]
        queued = Queued(self, given, targets, seed)
        device.enqueue(torch._C._cuda_getCurrentRawStream(0), queued.run, self.label)
        if results is None:
            return unpacked([bound[name] for name in self.returned])
        others = iter(results)
        return unpacked([bound[name] if name else next(others) for name in self.returned])

    def find_cpu_kernel(self) -> Any:
        has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
        if any(has_kernel(f"aten::{self.name}", key) for key in CPU_KEYS):
            return self.overload
        found = STAND_INS.get(self.name)
        if found is None:  # PyTorch's own decompositions have some
            from torch._decomp import decomposition_table

            found = decomposition_table.get(self.overload)
        if found is None:
            raise NotImplementedError(f"{self.label} has no kernel for the CPU: it is not imitated")
        return found

    def apply(self, function: Any, bound: dict[str, Any]) -> Any:
        # PyTorch hands numbers to overloads for tensors, which Python cannot.
        if any(isinstance(bound.get(name), (int, float, complex)) for name in self.tensors):
            function = self.overload.overloadpacket
        named = dict(bound)
        args = [named.pop(name) for name in self.positional if name in bound]
        return function(*args, **named)

    def on_meta(self, bound: dict[str, Any]) -> Any:
        has_tensor = any(isinstance(x, torch.Tensor) for x in bound.values())
        return self.apply(self.overload if has_tensor else self.cpu_kernel, bound)

    def results_like(self, bound: dict[str, Any]) -> list[Any]:
        """What the results are like that are not arguments."""
        key = (
            torch.get_default_dtype(),
            *((name, kind(x, name in self.numbers)) for name, x in bound.items()),
        )
        found = self.shapes.get(key)
        if found is None:
            if len(self.shapes) >= MOST_SHAPES:
                self.shapes.clear()
            found = self.shapes[key] = self.find_results(bound)
        return found

    def find_results(self, bound: dict[str, Any]) -> list[Any]:
        try:
            made = {name: convert(x, to_meta) for name, x in bound.items()}
            got = self.on_meta(made | ({"device": "meta"} if "device" in made else {}))
        except (NotImplementedError, AttributeError):  # there is no such, or a wrong one
            got = self.apply(
                self.cpu_kernel, {name: convert(x, to_zeros) for name, x in bound.items()}
            )
        return [nested(x, like) for x in self.new_ones(got)]

    def new_ones(self, got: Any) -> list[Any]:
        """Of what a kernel returns, the results that are not arguments."""
        if len(self.returned) == 1:
            return [got]
        return [x for name, x in zip(self.returned, got or (), strict=True) if name is None]

    def resize_outs(self, bound: dict[str, Any]) -> bool:
        """Give the tensors of out= their shapes, if those can be known."""
        try:
            made = {name: convert(x, to_meta) for name, x in bound.items()}
            for name in self.outs:
                made[name] = convert(
                    bound[name], lambda x: torch.empty(0, dtype=x.dtype, device="meta")
                )
            self.on_meta(made)
        except NotImplementedError:
            return False
        for name in self.outs:
            for out, shaped in zip(flat(bound[name]), flat(made[name]), strict=True):
                if out.shape != shaped.shape:
                    out.resize_(shaped.shape)
        return True

    def synchronous(self, bound: dict[str, Any]) -> Any:
        wait(self.label)
        made = {name: convert(x, to_cpu) for name, x in bound.items()}
        for name in self.outs:
            made[name] = convert(bound[name], lambda x: torch.empty(0, dtype=x.dtype))
        got = self.apply(self.cpu_kernel, made)
        for name in self.outs:
            for out, x in zip(flat(bound[name]), flat(made[name]), strict=True):
                out.resize_(x.shape)
                out.copy_(x)
        if self.writes:
            return unpacked([bound[name] for name in self.returned])
        return tuple(map(to_cuda, got)) if len(self.returned) > 1 else nested(got, to_cuda)


class Queued(NamedTuple):
    """A call of an operator that waits for its turn; a graph runs it again and again."""

    operator: Operator
    given: dict[str, Any]
    targets: list[Alias]
    seed: int | None

    def run(self) -> None:
        with quiet():
            bound = {name: resolve(x) for name, x in self.given.items()}
            if self.seed is None:
                got = self.operator.apply(self.operator.cpu_kernel, bound)
            else:
                got = self.draw(bound)
            if not self.targets:
                return
            made = flat(self.operator.new_ones(got))
            made = [x for x in made if isinstance(x, torch.Tensor)]
            for target, x in zip(self.targets, made, strict=True):
                view = target.tensor()
                assert view.shape == x.shape, (self.operator.label, view.shape, x.shape)
                view.copy_(x)

    def draw(self, bound: dict[str, Any]) -> Any:
        state = torch.default_generator.get_state()
        torch.default_generator.manual_seed(self.seed)
        try:
            return self.operator.apply(self.operator.cpu_kernel, bound)
        finally:
            torch.default_generator.set_state(state)


def poisoned(kernel: Any) -> Any:
    """An allocation whose memory is garbage, in the order of the stream."""
    if os.environ.get("SOFTWARE_CUDA_NO_POISON"):
        return lambda keyset, *args, **kwargs: kernel.call_boxed(keyset, *args, **kwargs)

    def allocate(keyset: Any, *args: Any, **kwargs: Any) -> Any:
        x = kernel.call_boxed(keyset, *args, **kwargs)
        storage = x.untyped_storage()
        n_bytes = storage.nbytes()
        if x.is_cuda and 0 < n_bytes <= MOST_POISONED_BYTES:
            stream = torch._C._cuda_getCurrentRawStream(0)
            device.runtime.device_fill(stream, storage.data_ptr(), n_bytes)
        return x

    return allocate


def copy_of(kernel: Any) -> Any:
    """PyTorch's copy, but for those within the device that need a kernel."""
    operator = Operator("copy_", torch.ops.aten.copy_.default)

    def copy(keyset: Any, target: Any, source: Any, non_blocking: bool = False) -> Any:
        if target.is_cuda and source.is_cuda:
            differs = (
                target.dtype != source.dtype
                or target.shape != source.shape
                or not target.is_contiguous()
                or not source.is_contiguous()
                or target.is_neg() != source.is_neg()
                or target.is_conj() != source.is_conj()
            )
            if differs:
                return operator.call(keyset, target, source, non_blocking)
        return kernel.call_boxed(keyset, target, source, non_blocking)

    return copy


def sparse(name: str) -> Any:
    """A kernel on sparse tensors: waits, as most of CUDA's do, and goes through the host."""
    operator = find(name)

    def to_host(x: Any) -> Any:
        if not x.is_cuda:
            return x
        if x.layout == torch.strided:
            return Alias(x).tensor()
        parts = x._indices().cpu(), x._values().cpu()
        return torch.sparse_coo_tensor(*parts, x.shape, check_invariants=False)._coalesced_(
            x.is_coalesced()
        )

    def call(keyset: Any, *args: Any, **kwargs: Any) -> Any:
        device.operator_counts[name] += 1
        wait(name)
        with quiet():
            on_host = [convert(x, to_host) for x in args]
            got = operator(*on_host, **{n: convert(x, to_host) for n, x in kwargs.items()})
        if name.endswith("_.Tensor"):
            if args[0].layout != torch.strided:
                raise NotImplementedError(f"{name} on a sparse tensor in place is not imitated")
            return args[0]
        if got.layout == torch.strided:
            return got.to("cuda")
        parts = got._indices().to("cuda"), got._values().to("cuda")
        return torch.sparse_coo_tensor(*parts, got.shape, check_invariants=False)._coalesced_(
            got.is_coalesced()
        )

    return call


# Kernels that only CUDA has, on tensors of the CPU.


def lstm(
    input_gates: Any, hidden_gates: Any, cx: Any, input_bias: Any = None, hidden_bias: Any = None
) -> Any:
    gates = input_gates + hidden_gates
    if input_bias is not None:
        gates = gates + input_bias + hidden_bias
    i, f, g, o = gates.chunk(4, 1)
    i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
    cy = f * cx + i * g
    return o * cy.tanh(), cy, torch.cat([i, f, g, o], 1)


def lstm_backward(
    grad_hy: Any, grad_cy: Any, cx: Any, cy: Any, workspace: Any, has_bias: bool
) -> Any:
    i, f, g, o = workspace.chunk(4, 1)
    t = cy.tanh()
    grad_h = torch.zeros_like(cx) if grad_hy is None else grad_hy
    grad_c = grad_h * o * (1 - t * t) + (0 if grad_cy is None else grad_cy)
    parts = [grad_c * g * i * (1 - i), grad_c * cx * f * (1 - f)]
    parts += [grad_c * i * (1 - g * g), grad_h * t * o * (1 - o)]
    gates = torch.cat(parts, 1)
    return gates, grad_c * f, gates.sum(0) if has_bias else None


def gru(
    input_gates: Any, hidden_gates: Any, hx: Any, input_bias: Any = None, hidden_bias: Any = None
) -> Any:
    if input_bias is not None:
        input_gates, hidden_gates = input_gates + input_bias, hidden_gates + hidden_bias
    (ir, iz, inn), (hr, hz, hn) = input_gates.chunk(3, 1), hidden_gates.chunk(3, 1)
    r, z = (ir + hr).sigmoid(), (iz + hz).sigmoid()
    n = (inn + r * hn).tanh()
    return n + z * (hx - n), torch.cat([r, z, n, hx, hn], 1)


def gru_backward(grad_hy: Any, workspace: Any, has_bias: bool) -> Any:
    r, z, n, hx, hn = workspace.chunk(5, 1)
    grad_n = grad_hy * (1 - z) * (1 - n * n)
    grad_r, grad_z = grad_n * hn * r * (1 - r), grad_hy * (hx - n) * z * (1 - z)
    of_input = torch.cat([grad_r, grad_z, grad_n], 1)
    of_hidden = torch.cat([grad_r, grad_z, grad_n * r], 1)
    biases = (of_input.sum(0), of_hidden.sum(0)) if has_bias else (None, None)
    return of_input, of_hidden, grad_hy * z, *biases


def wide(name: str) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        *tensors, dtype = args
        return getattr(torch, name)(*(x.to(dtype) for x in tensors), **kwargs)

    return call


STAND_INS = {
    "_thnn_fused_lstm_cell": lstm,
    "_thnn_fused_lstm_cell_backward_impl": lstm_backward,
    "_thnn_fused_gru_cell": gru,
    "_thnn_fused_gru_cell_backward": gru_backward,
    **{f"{name}.dtype": wide(name) for name in ("mm", "bmm", "addmm", "baddbmm")},
}
