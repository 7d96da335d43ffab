"""What a function computes, as a string to compare with another function's: its bytecode without names of locals, docstrings,
files and lines, with everything of its modelling file that it calls.

transformers copies the same code into many families (its "modular" system), so equal code is how a family's module is recognised
(``canonical.py``). Both sides are compiled by the interpreter that runs, so the string need not be the same in another one.
"""

from __future__ import annotations

import dis
import functools
import hashlib
import inspect
import types
from collections.abc import Iterator
from typing import Any

from torch import nn

__all__ = ["fingerprint", "function_fingerprint"]

# Families' code: functions from here are compared by what they do, all others (torch, transformers' own) by their name.
_FAMILIES = "transformers.models."
# Runs only where the configuration chooses attn_implementation="eager"; the executors stand back there.
_NOT_ENTERED = {"eager_attention_forward"}
_ARGUMENTS = inspect.CO_VARARGS | inspect.CO_VARKEYWORDS


@functools.cache
def fingerprint(owner: type) -> str:
    """Of ``owner.forward`` and, as far as it calls them, the class's own methods."""
    return _of_function(owner.forward, owner, ())  # type: ignore[attr-defined]


@functools.cache
def function_fingerprint(function: Any) -> str:
    """Of a function of a modelling file."""
    return _of_function(function, None, ())


def _of_function(function: Any, owner: type | None, seen: tuple[Any, ...]) -> str:
    code = function.__code__
    if code in seen:
        return "recursion"
    cells = dict(zip(code.co_freevars, function.__closure__ or (), strict=False))
    parts = list(_of_code(code, function.__globals__, cells, owner, (*seen, code)))
    if seen:  # a forward is called with its arguments; what it calls may leave some out
        parts.append(
            repr([value if isinstance(value, int | float | str | None) else type(value) for value in function.__defaults__ or ()])
        )
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _of_code(
    code: types.CodeType, names: dict[str, Any], cells: dict[str, Any], owner: type | None, seen: tuple[Any, ...]
) -> Iterator[str]:
    yield repr((code.co_argcount, code.co_kwonlyargcount, code.co_flags & _ARGUMENTS))
    for step in dis.get_instructions(code):
        if step.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            yield f"global {_of_global(step.argval, names, seen)}"
        elif step.opcode in dis.hasname:
            yield f"{step.opname} {_of_attribute(step.argval, owner, seen)}"
        elif step.opcode in dis.hasconst:
            if isinstance(step.argval, types.CodeType):
                yield from _of_code(step.argval, names, {}, owner, seen)
            else:
                yield f"{step.opname} {_of_constant(step.argval)}"
        elif step.opcode in dis.hasfree:
            cell = cells.get(step.argval)
            yield f"{step.opname} {_of_object(cell.cell_contents, seen) if cell and step.argval != '__class__' else step.arg}"
        elif step.opname not in ("EXTENDED_ARG", "NOP", "CACHE", "RESUME"):
            yield f"{step.opname} {step.arg}"


def _of_constant(value: Any) -> str:
    """Functions within functions are named by where they are, which Python 3.10 keeps as a constant."""
    return repr(value.rpartition(".<locals>.")[2] if isinstance(value, str) else value)


def _of_global(name: str, names: dict[str, Any], seen: tuple[Any, ...]) -> str:
    return f"named {name}" if name in _NOT_ENTERED or name not in names else _of_object(names[name], seen)


def _of_attribute(name: str, owner: type | None, seen: tuple[Any, ...]) -> str:
    """A name after a dot; if the class defines a method of that name below nn.Module, what that does."""
    for parent in owner.__mro__ if owner is not None else ():
        if parent is nn.Module:
            break
        if isinstance(method := vars(parent).get(name), types.FunctionType):
            return f"method {_of_function(method, owner, seen)}"
    return name


def _of_object(value: Any, seen: tuple[Any, ...]) -> str:
    if isinstance(value, types.ModuleType):
        return value.__name__
    if isinstance(value, nn.Module):  # what transformers makes of a function that a hub kernel may replace
        return _of_function(type(value).forward, type(value), seen)
    if isinstance(value, types.FunctionType) and (value.__module__ or "").startswith(_FAMILIES):
        return _of_function(value, None, seen)
    if isinstance(value, type | types.FunctionType | types.BuiltinFunctionType):
        return f"{value.__module__}.{value.__qualname__}"
    return f"a {type(value).__qualname__}"
