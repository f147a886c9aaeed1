"""Triton's interpreter without the work that it does again and again.

At each call of a device function within a kernel it looks through its whole language for what is
built in, and replaces that by what runs in NumPy, though the kernel has replaced it already: two
thirds of its time. Here that is done once for a kernel, with names that are found once. A third of
the rest is each sum and product of integers once more, in 64 bits, for a check of overflow that
runs only where one debugs. What runs is the same. Versions of Triton that lack these functions are
left as they are.
"""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import triton.language as tl
from triton.runtime import interpreter

_names: dict[Any, list[str]] = {}  # of what is built in, by module or class
# Which modules of the language a function sees, and those that the kernel that runs has replaced.
_seen: dict[Any, tuple[bool, bool]] = {}
_replaced: set[tuple[bool, bool]] = set()
_np_dtypes: dict[str, Any] = {}  # by the names of Triton's types


def install() -> None:
    """Let the interpreter of this process work so."""
    names = ("_patch_builtin", "_patch_attr", "_patch_lang", "_LangPatchScope")
    if all(hasattr(interpreter, name) for name in names):
        interpreter._patch_builtin = _patch_builtin
        interpreter._patch_lang = _patch_lang
    options = getattr(interpreter.interpreter_builder, "options", None)
    if hasattr(options, "sanitize_overflow") and not getattr(options, "debug", True):
        changed = dataclasses.replace(options, sanitize_overflow=False)
        interpreter.interpreter_builder.options = changed
    if hasattr(interpreter, "_get_np_dtype"):
        interpreter._get_np_dtype = _get_np_dtype


_original_get_np_dtype = getattr(interpreter, "_get_np_dtype", None)


def _get_np_dtype(dtype: Any) -> Any:
    if dtype.name not in _np_dtypes:
        _np_dtypes[dtype.name] = _original_get_np_dtype(dtype)
    return _np_dtypes[dtype.name]


def _patch_builtin(package: Any, *more: Any) -> None:
    if package not in _names:
        members = inspect.getmembers(package)
        _names[package] = [name for name, member in members if tl.core.is_builtin(member)]
    for name in _names[package]:
        member = getattr(package, name)
        if tl.core.is_builtin(member):
            interpreter._patch_attr(package, name, member, *more)


_original_patch_lang = getattr(interpreter, "_patch_lang", None)


def _patch_lang(function: Any) -> Any:
    if function not in _seen:
        values = function.__globals__.values()
        is_there = (any(value is module for value in values) for module in (tl, tl.core))
        _seen[function] = next(is_there), next(is_there)
    modules = _seen[function]
    if modules in _replaced:
        return interpreter._LangPatchScope()  # a device function's: there is nothing to restore
    scope = _original_patch_lang(function)
    restore = scope.restore

    def restore_all() -> None:
        _replaced.clear()
        restore()

    scope.restore = restore_all
    _replaced.add(modules)
    return scope
