"""How functions are compiled, cached and tried once, and what Numba's Python lacks for them.

With versions that nobody has tested together a compiler may be wrong and say nothing: so what is
compiled is compared with `reference` on some hundred values before its first use. What passes is
noted beside Numba's cache, for all processes with the same processor, sources and versions.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
import threading
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias, TypeVar, cast

import llvmlite
import numba
import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.core.registry import cpu_target
from numba.extending import intrinsic, overload
from torch import Tensor

from gradstat import bins, formats, results
from gradstat.util import warn

# Numba and llvmlite ship no types: a number, memory indexed as an array, objects of the compiler.
Scalar: TypeAlias = Any
Pointer: TypeAlias = Any
IR: TypeAlias = Any
Function = TypeVar("Function", bound=Callable[..., Any])

_njit: IR = numba.njit
_overload: IR = overload
compiler_intrinsic: Callable[[Callable[..., IR]], Callable[..., Scalar]] = intrinsic
_types: IR = types
_OPTIONS = {"error_model": "numpy"}
# Sums may be taken in any order: that is what makes them vectors. The order is fixed at
# compilation, so results do not vary. Never nnan or ninf: with those LLVM drops tests for NaN.
_ANY_ORDER = {**_OPTIONS, "fastmath": {"reassoc", "nsz", "contract"}}
_SLOW_SECONDS = 1.0  # a compilation that takes longer is announced on a terminal
_ANNOUNCEMENT = "gradstat: compiling for this processor, once; later runs start at once\n"

TOLERANCE = 1e-5  # of floats, relative
_SPECIAL = (0.0, -0.0, float("nan"), float("inf"), -float("inf"))


def compiled(function: Function) -> Function:
    """Compile a function that only compiled functions call, in IEEE arithmetic."""
    result: Function = _njit(**_OPTIONS, no_cpython_wrapper=True, no_cfunc_wrapper=True)(function)
    return result


def inlined(function: Function) -> Function:
    """Put a function into the one that calls it before that is compiled."""
    result: Function = _njit(**_OPTIONS, inline="always")(function)
    return result


def compiled_for_types(make: Callable[..., Any], options: IR = _OPTIONS) -> Callable[..., Any]:
    """Compile, for Numba's types of the arguments, the function that ``make`` returns for them."""

    def stand_in(*arguments: object) -> None: ...

    _overload(stand_in, jit_options=options, strict=False)(make)
    return stand_in


compiled_sums_for_types = functools.partial(compiled_for_types, options=_ANY_ORDER)


def compile_entry(
    function: Function,  # of a module in this package
    name: str,  # tells it from others of the same source
    arguments: str,  # Numba's signature
) -> Function:
    """Compile a function that Python calls, or load it from Numba's cache on disk."""
    # The names of the cache's files have in them all that decides what is compiled: processes that
    # compile at the same time write the same files.
    function.__qualname__ = f"{function.__name__}_{name}_{_checksum():08x}"
    compile_now = functools.partial(_njit, arguments, nogil=True, **_OPTIONS)
    announcement = threading.Timer(_SLOW_SECONDS, sys.stderr.write, [_ANNOUNCEMENT])
    if sys.stderr.isatty():
        announcement.start()
    try:
        result: Function = compile_now(cache=True)(function)
    except RuntimeError:  # no directory in which Numba could write its cache
        result = compile_now()(function)
    finally:
        announcement.cancel()
    return result


@functools.cache
def entry_point(entry: Callable[..., Any]) -> Callable[..., Any]:
    """What an entry calls once it knows the types of its arguments, which are always the same."""
    # An OrderedDict's own values() asks keys for their hashes, and an interrupt becomes a KeyError.
    (compiled,) = dict.values(cast(Any, entry).overloads)
    result: Callable[..., Any] = compiled.entry_point
    return result


@functools.cache
def address_of(entry: Callable[..., Any]) -> int:
    """Where an entry's machine code begins, for a caller that is not Python."""
    (compiled,) = dict.values(cast(Any, entry).overloads)
    name = compiled.fndesc.llvm_cfunc_wrapper_name
    address: int = compiled.library.get_pointer_to_function(name)
    return address


@functools.cache
def _checksum() -> int:
    """Checksum of processor, compiler and all that is compiled; Numba looks at one file only."""
    others = [Path(str(each.__file__)) for each in (bins, formats, results)]
    paths = [*sorted(Path(__file__).parent.glob("*.py")), *others]
    sources = [path.read_bytes() for path in paths]
    # NumPy computes constants that are compiled.
    versions = numba.__version__, llvmlite.__version__, np.__version__
    return zlib.crc32(b"".join([repr((target(), versions)).encode(), *sources]))


def target() -> tuple[str, str, str]:
    """Triple, processor and its features, for which Numba compiles."""
    target: tuple[str, str, str] = cpu_target.target_context.codegen().magic_tuple()
    return target


def trial_tensors(dtype: torch.dtype) -> list[Tensor]:
    """A few hundred values, over float16's magnitudes; alone, with special ones, and repeated."""
    # The repeated are counted in other ways. All sums are about as large as those of magnitudes.
    n = torch.arange(600, dtype=torch.float64, device="cpu")
    values = torch.exp(11 * torch.sin(n)) * torch.where(n % 8 == 0, -1.0, 1.0)
    special = torch.tensor(_SPECIAL, dtype=torch.float64, device="cpu")
    tensors = values.reshape(4, 150), torch.cat([special, values]), values.repeat(10, 6)
    return [x.to(dtype) for x in tensors]


def passes_trial(
    entry: Callable[..., Any],  # what `compile_entry` returned
    what: str,  # it computes, for the warning
    measure: Callable[[], Sequence[Tensor]],  # gives results of it
    define: Callable[[], Sequence[Tensor]],  # gives those of `reference`
) -> bool:
    """Whether a compiled function may be used; a warning says where it may not."""
    note = _note(entry)
    if note is not None and note.exists():
        return True
    with np.errstate(all="ignore"):  # whatever is wrong is said below
        agrees = all(map(_agree, measure(), define()))
    if not agrees:
        warn(
            f"the CPU engine computes {what} wrongly with NumPy {np.__version__}, Numba "
            f"{numba.__version__} and PyTorch {torch.__version__}: the engine 'reference', which "
            f"is slow, takes its place"
        )
        return False
    if note is not None:
        with contextlib.suppress(OSError):  # only read from here
            note.touch()
    return True


def _note(entry: Callable[..., Any]) -> Path | None:
    """The file that says that a function has passed; ``None`` where Numba keeps no cache."""
    # Numba's own wrapper hides the function as well.
    compiled: Any = inspect.unwrap(entry, stop=lambda each: hasattr(each, "stats"))
    directory = compiled.stats.cache_path
    name = f"{compiled.py_func.__qualname__}-torch{torch.__version__}.agrees"
    return None if directory is None else Path(directory) / name


def _agree(got: Tensor, expected: Tensor) -> bool:
    if not expected.is_floating_point():
        return torch.equal(got, expected)
    return torch.allclose(got, expected, rtol=TOLERANCE, atol=0, equal_nan=True)


@compiler_intrinsic
def reinterpret(typing_context: IR, value: IR, dtype: IR) -> IR:
    """``reinterpret(value, dtype)``: the bits of a number as another type of its width."""
    kind = dtype.dtype
    return kind(value, dtype), lambda context, builder, _, arguments: builder.bitcast(
        arguments[0], context.get_value_type(kind)
    )


def _choose_by(comparison: str) -> Callable[..., IR]:
    def choose(typing_context: IR, a: IR, b: IR) -> IR:
        kind = typing_context.unify_types(a, b)

        def generate(context: IR, builder: IR, signature: IR, arguments: IR) -> IR:
            compare = builder.fcmp_ordered
            if isinstance(kind, _types.Integer):
                compare = builder.icmp_signed if kind.signed else builder.icmp_unsigned
            a, b = arguments
            return builder.select(compare(comparison, b, a), b, a)

        return kind(kind, kind), generate

    return choose


# As `min` and `max` of two numbers, which Numba compiles by themselves for each of their types.
smaller, larger = (compiler_intrinsic(_choose_by(comparison)) for comparison in "<>")


@compiler_intrinsic
def pointer(typing_context: IR, start: IR, dtype: IR) -> IR:
    """``pointer(start, dtype)``: memory to be indexed as an array, from an address or a pointer.

    Unlike an array it costs neither compilation nor counting of references.
    """
    kind = _types.CPointer(dtype.dtype)
    convert = "inttoptr" if isinstance(start, types.Integer) else "bitcast"
    return kind(start, dtype), lambda context, builder, _, arguments: getattr(builder, convert)(
        arguments[0], context.get_value_type(kind)
    )


@compiler_intrinsic
def after(typing_context: IR, start: IR, n: IR) -> IR:
    """``after(start, n)``: the pointer ``n`` elements further."""
    return start(start, types.int64), lambda _, builder, __, arguments: builder.gep(
        arguments[0], [arguments[1]]
    )


@compiler_intrinsic
def atomic_add(typing_context: IR, cell: IR, value: IR) -> IR:
    """``atomic_add(cell, value)``: add to the int64 there; returns what it was before."""
    return types.int64(cell, types.int64), lambda _, builder, __, arguments: builder.atomic_rmw(
        "add", *arguments, "monotonic"
    )


@inlined
def flushes(n: int) -> Scalar:
    """Whether this thread flushes subnormal numbers; ``n`` is any positive number."""
    # Its bits are those of a subnormal number. The compiler would leave out a product with 1.
    return reinterpret(np.int64(n), np.float64) * np.float64(n) == 0


# Work that threads share has a table, int64, that begins with these: the next item that nobody has
# taken; how many threads have come, and how many may work; the address of memory for each of these.
NEXT, CAME, THREADS, SCRATCHES = range(4)


@inlined
def own_scratch(head: Pointer, n_bytes: int) -> Scalar:
    """Address of this thread's memory, of so many bytes; 0 if it is to leave the work to others."""
    if flushes(head[THREADS]):
        return np.int64(0)
    came = atomic_add(after(head, CAME), 1)
    return head[SCRATCHES] + came * n_bytes if came < head[THREADS] else np.int64(0)


@compiler_intrinsic
def prefetch(typing_context: IR, start: IR) -> IR:
    """``prefetch(start)``: ask for the memory there, which need not exist, in the cache."""

    def generate(context: IR, builder: IR, signature: IR, arguments: IR) -> IR:
        byte, number = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [byte, number, number, number])
        fetch = builder.module.declare_intrinsic("llvm.prefetch", (byte,), kind)
        how = (number(0), number(2), number(1))  # to read, near, data
        builder.call(fetch, [builder.bitcast(arguments[0], byte), *how])
        return context.get_dummy_value()

    return types.void(start), generate
