"""Reading code: what a function may do beside what ``torch.fx`` sees of it, and whom a class's methods call.

Bytecode is read, which is there where source may not be.
"""

from __future__ import annotations

import dis
import enum
import inspect
import sys
import types
from collections.abc import Iterable, Iterator
from types import CodeType, FrameType
from typing import Any

import torch

PLAIN = (bool, int, float, complex, str, bytes, type(None), enum.Enum, torch.dtype, torch.device, torch.memory_format)


def is_code(value: Any) -> bool:
    return isinstance(value, type | types.FunctionType | types.BuiltinFunctionType | types.MethodType)


def found_again(value: Any) -> bool:
    """Whether another process finds the same function or class under its name."""
    if getattr(torch, getattr(value, "__name__", ""), None) is value:
        return True
    found: Any = sys.modules.get(getattr(value, "__module__", None) or "")
    for part in getattr(value, "__qualname__", "").split("."):
        found = getattr(found, part, None)
    return found is value


# ---- what may run


def of_torch(module: str) -> bool:
    return module == "torch" or module.startswith("torch.")


_BUILTINS = {"abs", "all", "any", "divmod", "getattr", "iter", "len", "max", "min", "next", "pow", "round", "sorted"}
_BUILTINS |= {"sum"}
_PURE_MODULES = {"math", "_operator", "itertools", "_functools", "torch._C._nn"}
_DATA = (list, dict, set, tuple, str, int, float, bytes, frozenset)


def is_harmless_builtin(function: Any) -> bool:
    owner = getattr(function, "__self__", None)
    if isinstance(owner, types.ModuleType):
        return owner.__name__ in _PURE_MODULES or (owner.__name__ == "builtins" and function.__name__ in _BUILTINS)
    if isinstance(owner, _DATA):
        return True
    if isinstance(owner, type) and issubclass(owner, _DATA):
        return True
    return _is_operation(function)


def _is_operation(function: Any) -> bool:
    """Whether it is an operation on tensors, which the graph shows, and not one that makes them or asks for a mode."""
    named = getattr(torch, getattr(function, "__name__", ""), None)
    return named is function and function not in torch.overrides.get_ignored_functions()


def spelled(function: Any) -> str:
    return getattr(function, "__qualname__", None) or repr(function)


_WALKS = {"modules", "named_modules", "children", "named_children", "get_submodule", "_modules", "__getattr__"}


def escapes(code: CodeType) -> bool:
    """Whether a method hands its object to others, or walks through its children, so that anything may be called."""
    steps = list(dis.get_instructions(code))
    first = code.co_varnames[:1]
    for step, after in zip(steps, [*steps[1:], None], strict=True):
        if step.opname in ("LOAD_ATTR", "LOAD_METHOD") and step.argval in _WALKS:
            return True
        if step.opname == "LOAD_GLOBAL" and step.argval in ("getattr", "vars"):
            return True
        if step.opname.startswith("LOAD_FAST"):
            loaded = step.argval if isinstance(step.argval, tuple) else (step.argval,)
            used = after is not None and ("ATTR" in after.opname or after.opname == "LOAD_METHOD")
            if first and (first[0] in loaded[:-1] or (loaded[-1] == first[0] and not used)):
                return True
    return any(isinstance(constant, CodeType) and _mentions_walks(constant) for constant in code.co_consts)


def _mentions_walks(code: CodeType) -> bool:
    return bool(_WALKS.intersection(code.co_names))


_STORES = ("STORE_ATTR", "DELETE_ATTR", "STORE_GLOBAL", "DELETE_GLOBAL")


def why_not_code(frame: FrameType, modules: type, values: type) -> str | None:
    """Why a function that is about to run may do what a graph does not show, in words.

    Args:
        frame: the function's.
        modules: of which class the modules are that tell what is read of them.
        values: of which class the values are whose use the graph shows.
    """
    steps = list(dis.get_instructions(frame.f_code))
    for i, step in enumerate(steps):
        if step.opname in _STORES:
            return f"sets or deletes {step.argval}"
        if step.opname in ("LOAD_ATTR", "LOAD_METHOD") and step.argval in ("__class__", "__dict__"):
            return f"reads {step.argval}"
        if step.opname == "PUSH_EXC_INFO":
            return "contains a try or a with"
        if step.opname.startswith("MATCH_"):
            return "contains a match"
        if step.opname == "IMPORT_NAME":
            return f"imports {step.argval}"
        if (step.opname == "IS_OP" or step.opname.endswith("NONE")) and not _is_about(modules, steps[:i], frame):
            return "asks which object a value is, which may be a tensor"
        if step.opname in ("LOAD_GLOBAL", "LOAD_NAME") and (why := _why_not_global(step, steps[i + 1 :], frame)):
            return why
    local = frame.f_locals
    for name in frame.f_code.co_freevars:
        if name in local and not _is_constant(local[name]) and not isinstance(local[name], modules | values):
            return f"uses {name} of the function around it, which may change"
    return None


def _is_about(modules: type, before: list[dis.Instruction], frame: FrameType) -> bool:
    """Whether the value on the stack is an attribute of one of these modules."""
    if before and before[-1].opname == "LOAD_CONST":
        before = before[:-1]
    attributes = 0
    while before and before[-1].opname == "LOAD_ATTR":
        before, attributes = before[:-1], attributes + 1
    if not before or not attributes or not before[-1].opname.startswith("LOAD_FAST"):
        return False
    loaded = before[-1].argval
    name = loaded[-1] if isinstance(loaded, tuple) else loaded
    return isinstance(frame.f_locals.get(name), modules)


def _why_not_global(step: dis.Instruction, after: Iterable[dis.Instruction], frame: FrameType) -> str | None:
    name = step.argval
    if name not in frame.f_globals:
        return f"calls {name}" if name == "type" else None
    value = frame.f_globals[name]
    for later in after:
        if not isinstance(value, types.ModuleType | type) or later.opname not in ("LOAD_ATTR", "LOAD_METHOD"):
            break
        name, value = f"{name}.{later.argval}", getattr(value, later.argval, None)
    return None if _is_constant(value) else f"reads {name}, which may change"


def _is_constant(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_constant, value))
    constant = isinstance(value, PLAIN) and not isinstance(value, bool) and value is not None
    return constant or is_code(value) or isinstance(value, types.ModuleType | types.MethodDescriptorType)


# ---- what code mentions without running


def methods(cls: type) -> Iterator[CodeType]:
    """The code of a class's methods, as far as they are not torch's own; not of __init__."""
    seen = {"__init__"}
    for base in cls.__mro__:
        if of_torch(base.__module__) or base is object:
            continue
        for name, member in vars(base).items():
            function = getattr(member, "fget", None) or getattr(member, "__func__", None) or member
            code = getattr(inspect.unwrap(function), "__code__", None) if callable(function) else None
            if isinstance(code, CodeType) and name not in seen:
                yield code
        seen |= vars(base).keys()


def mentions(code: CodeType) -> Iterator[tuple[str, bool, bool]]:
    """Each attribute that code reads: its name, whether of self, whether only to call it."""
    steps = list(dis.get_instructions(code))
    first = code.co_varnames[:1]
    for before, step in zip([None, *steps], steps, strict=False):
        if step.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            loaded = before.argval if before is not None and before.opname.startswith("LOAD_FAST") else None
            base = loaded[-1:] if isinstance(loaded, tuple) else (loaded,)
            called = step.opname == "LOAD_METHOD" or (sys.version_info >= (3, 12) and bool((step.arg or 0) & 1))
            yield step.argval, base == first, called
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from mentions(constant)
