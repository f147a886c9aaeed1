"""How the CPU engine's passes are compiled and cached, and what Numba's Python lacks for them."""

from __future__ import annotations

import platform
from collections.abc import Callable
from typing import Any, TypeAlias, TypeVar, cast

from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic
from numba.np.numpy_support import carray
from numpy.typing import NDArray

Array: TypeAlias = NDArray[Any]
Scalar: TypeAlias = Any  # a number as Numba types it
IR: TypeAlias = Any  # Numba's and llvmlite's own objects, which ship no types
Function = TypeVar("Function", bound=Callable[..., Any])

_njit: IR = njit
_OPTIONS = {"error_model": "numpy"}
_INNER = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True}

_BYTE, _INT32, _INT64 = ir.IntType(8), ir.IntType(32), ir.IntType(64)
_IS_X86 = platform.machine().lower() in ("x86_64", "amd64")
_IS_ARM = platform.machine().lower() in ("aarch64", "arm64")


def compiled(function: Function) -> Function:
    """Compile a function that only compiled functions call, in IEEE arithmetic."""
    result: Function = _njit(**_OPTIONS, **_INNER)(function)
    return result


def compiled_sum(function: Function) -> Function:
    """`compiled`, but sums may be taken in any order: that is what makes them vectors.

    The order is fixed at compilation, so results do not vary. Never ``nnan`` or ``ninf``: with
    those LLVM drops every test for NaN.
    """
    fastmath = {"reassoc", "nsz", "contract"}
    result: Function = _njit(fastmath=fastmath, **_OPTIONS, **_INNER)(function)
    return result


def compiled_entry(function: Function) -> Function:
    """Compile a function that Python calls, with all that it calls, and cache it on disk."""
    try:
        result: Function = _njit(cache=True, nogil=True, **_OPTIONS)(function)
    except RuntimeError:  # no directory in which Numba could write its cache
        result = _njit(nogil=True, **_OPTIONS)(function)
    return result


def _intrinsic(function: Callable[..., IR]) -> Callable[..., Scalar]:
    return cast("Callable[..., Scalar]", intrinsic(function))


@_intrinsic
def _pointer(typing_context: IR, address: IR, dtype: IR) -> IR:
    """``_pointer(address, dtype)``: an address as a pointer to a NumPy scalar type."""

    def generate(context: IR, builder: IR, signature: IR, arguments: IR) -> IR:
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    pointer_type: IR = types.CPointer
    return pointer_type(dtype.dtype)(address, dtype), generate


@compiled
def array_at(address: int, dtype: IR, size: int) -> Array:
    """The memory at an address as an array."""
    array: Array = carray(_pointer(address, dtype), (size,))
    return array


@_intrinsic
def read(typing_context: IR, address: IR, dtype: IR) -> IR:
    """``read(address, dtype)``: the NumPy scalar at an address."""

    def generate(context: IR, builder: IR, signature: IR, arguments: IR) -> IR:
        kind = context.get_value_type(signature.return_type)
        where = builder.inttoptr(arguments[0], kind.as_pointer())
        return builder.load(where, align=1)

    return dtype.dtype(address, dtype), generate


@_intrinsic
def atomic_add(typing_context: IR, address: IR, value: IR) -> IR:
    """``atomic_add(address, value)``: add to the int64 there; returns what it was before."""

    def generate(context: IR, builder: IR, signature: IR, arguments: IR) -> IR:
        where = builder.inttoptr(arguments[0], _INT64.as_pointer())
        return builder.atomic_rmw("add", where, arguments[1], "monotonic")

    return types.int64(types.int64, types.int64), generate


@_intrinsic
def prefetch(typing_context: IR, address: IR) -> IR:
    """``prefetch(address)``: ask for the memory there, which need not exist, in the cache."""

    def generate(context: IR, builder: IR, signature: IR, arguments: IR) -> IR:
        kind = ir.FunctionType(ir.VoidType(), [_BYTE.as_pointer(), _INT32, _INT32, _INT32])
        fetch = builder.module.declare_intrinsic("llvm.prefetch", (_BYTE.as_pointer(),), kind)
        where = builder.inttoptr(arguments[0], _BYTE.as_pointer())
        builder.call(fetch, [where, _INT32(0), _INT32(2), _INT32(1)])  # to read, data, near
        return context.get_dummy_value()

    return types.void(types.int64), generate


@_intrinsic
def widen_half(typing_context: IR, bits: IR) -> IR:
    """``widen_half(bits)``: float32 value of a float16 given as uint16."""

    def generate(context: IR, builder: IR, signature: IR, arguments: IR) -> IR:
        return builder.fpext(builder.bitcast(arguments[0], ir.HalfType()), ir.FloatType())

    return types.float32(types.uint16), generate


@_intrinsic
def enter_ieee_mode(typing_context: IR) -> IR:
    """``enter_ieee_mode()``: stop flushing subnormals in this thread; returns the mode before.

    `torch.set_flush_denormal` sets it in one thread only, and no result should depend on which.
    """

    def generate(context: IR, builder: IR, signature: IR, arguments: IR) -> IR:
        if not (_IS_X86 or _IS_ARM):
            return _INT64(0)
        before = _read_mode(builder)
        flush_bits = 0x8040 if _IS_X86 else 1 << 24
        _write_mode(builder, builder.and_(before, before.type(~flush_bits)))
        return builder.zext(before, _INT64) if _IS_X86 else before

    return types.int64(), generate


@_intrinsic
def leave_ieee_mode(typing_context: IR, mode: IR) -> IR:
    """``leave_ieee_mode(mode)``: return to the mode that `enter_ieee_mode` found."""

    def generate(context: IR, builder: IR, signature: IR, arguments: IR) -> IR:
        if _IS_X86:
            _write_mode(builder, builder.trunc(arguments[0], _INT32))
        elif _IS_ARM:
            _write_mode(builder, arguments[0])
        return context.get_dummy_value()

    return types.void(types.int64), generate


def _read_mode(builder: IR) -> IR:
    if _IS_ARM:
        return builder.call(_instruction(builder, "llvm.aarch64.get.fpcr", _INT64, []), [])
    slot = builder.alloca(_INT32)
    store = _instruction(builder, "llvm.x86.sse.stmxcsr", ir.VoidType(), [_BYTE.as_pointer()])
    builder.call(store, [builder.bitcast(slot, _BYTE.as_pointer())])
    return builder.load(slot)


def _write_mode(builder: IR, mode: IR) -> None:
    if _IS_ARM:
        write = _instruction(builder, "llvm.aarch64.set.fpcr", ir.VoidType(), [_INT64])
        builder.call(write, [mode])
        return
    slot = builder.alloca(_INT32)
    builder.store(mode, slot)
    load = _instruction(builder, "llvm.x86.sse.ldmxcsr", ir.VoidType(), [_BYTE.as_pointer()])
    builder.call(load, [builder.bitcast(slot, _BYTE.as_pointer())])


def _instruction(builder: IR, name: str, result: IR, arguments: list[IR]) -> IR:
    return builder.module.declare_intrinsic(name, (), ir.FunctionType(result, arguments))
