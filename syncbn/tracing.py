"""Following a module's ``forward``: which modules and functions it calls, and on what that depends.

``torch.fx`` runs forward once, on proxies, and writes down what happens to these. What else forward does, it does not
see: a branch on an attribute, an ``isinstance`` (false for a proxy), a counter, a context such as ``no_grad``. So
every function that runs meanwhile is watched and its bytecode read. What the graph does not hold makes forward be
refused; the attributes that were read are reported.
"""

from __future__ import annotations

import functools
import inspect
import operator
import sys
import types
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from types import CodeType, FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, Node, Proxy, Tracer
from torch.fx.proxy import Attribute

from .reading import PLAIN, is_code, is_harmless_builtin, of_torch, spelled, why_not_code


class NotFollowedError(Exception):
    """What forward does cannot be known from one run of it."""

    def __init__(self, why: str) -> None:
        super().__init__(why)
        self.calls: list[str] = []  # the modules that it had called before


@dataclass(frozen=True)
class Read:
    """An attribute that forward has read. With another value, it might do something else."""

    names: tuple[str, ...]  # of the attribute, from the module on whose forward was followed
    value: Any

    def still_true(self, module: nn.Module) -> bool:
        """Whether ``module``'s attribute has the value it had."""
        current: Any = module
        for name in self.names:
            current = getattr(current, name, _ABSENT)
        if name == "_modules":
            current = tuple(current)
        return type(current) is type(self.value) and bool(current == self.value)


_ABSENT = object()


@dataclass
class Followed:
    """What forward does, in train() and in eval()."""

    train: Graph
    eval: Graph
    reads: tuple[Read, ...] = ()
    codes: set[CodeType] = field(default_factory=set)  # the functions that ran, forward among them
    lossy: str | None = None  # why code made from the graph would not do the same, if so


def follow(module: nn.Module) -> Followed:
    """Follows ``module.forward``; its children are not run, nor is anything about it changed.

    ``torch.fx`` patches ``nn.Module`` while it traces: no other thread may call a module meanwhile.

    Raises:
        NotFollowedError: the graph would not be all that forward does; says why.
    """
    train, eval_ = _Trace(module, training=True), _Trace(module, training=False)
    reads = {read.names: read for read in (*train.reads, *eval_.reads)}
    lossy = train.tracer.lossy or eval_.tracer.lossy
    return Followed(train.graph, eval_.graph, tuple(reads.values()), train.codes | eval_.codes, lossy)


class _Trace:
    """One run of forward, in one mode, on a stand-in for the module."""

    def __init__(self, module: nn.Module, training: bool) -> None:
        self.reads: list[Read] = []
        self.codes: set[CodeType] = set()
        self.machinery = 0  # how many functions of torch.fx are running inside each other
        self.running = False
        self.tracer = _Tracer(self)
        try:
            root = _stand_in(module, self, "", {})
            for each in root.modules():
                vars(each)["training"] = training
            before = _contents(root)
            self.graph = self.tracer.trace(root)
            if _contents(root) != before or not all(read.still_true(root) for read in self.reads):
                raise NotFollowedError("its forward changes its attributes")
        except Exception as error:
            why = str(error) if isinstance(error, NotFollowedError) else _first_line(error)
            refusal = NotFollowedError(why)
            refusal.calls = called_modules(getattr(self.tracer, "graph", Graph()))
            raise refusal from error

    # ---- what is read

    def note(self, stand_in: nn.Module, path: str, name: str, value: Any) -> None:
        """``name`` of a stand-in was read by forward, or by a function that it calls."""
        if not self.running or self.machinery or name == "__class__":
            return
        self.machinery += 1  # what is called from here is not forward's
        try:
            self._note(stand_in, path, name, value)
        finally:
            self.machinery -= 1

    def _note(self, stand_in: nn.Module, path: str, name: str, value: Any) -> None:
        if name == "training" and path:
            raise NotFollowedError(f"its forward asks for the mode of {path}, which may differ from its own")
        names = (*filter(None, path.split(".")), name)
        if name in ("_modules", "training"):
            if name == "_modules":
                self.reads.append(Read(names, tuple(value)))
            return
        if name in _INTERNAL or name == "__dict__":
            raise NotFollowedError(f"its forward reads {name}")
        own = name in object.__getattribute__(stand_in, "__dict__") or value is None
        if not own and (is_code(value) or isinstance(inspect.getattr_static(stand_in, name, None), property)):
            return
        if isinstance(value, nn.Module | Proxy):
            return
        self.reads.append(Read(names, snapshot(value, f"its forward reads self.{name}")))

    # ---- what is run

    def watch(self, function: Any, *args: Any) -> Any:
        """Calls ``function``, and looks at every function that runs meanwhile."""
        former = sys.getprofile()
        self.running = True
        sys.setprofile(self._see)
        try:
            return function(*args)
        finally:
            sys.setprofile(former)
            self.running = False

    def _see(self, frame: FrameType, event: str, argument: Any) -> None:
        if event == "return":
            self.machinery = max(0, self.machinery - 1)
        elif event == "call":
            self._see_call(frame)
        elif event == "c_call" and not self.machinery:
            module = frame.f_globals.get("__name__", "")
            if module != __name__ and not of_torch(module) and not is_harmless_builtin(argument):
                raise NotFollowedError(f"{frame.f_code.co_qualname} calls {spelled(argument)}")

    def _see_call(self, frame: FrameType) -> None:
        module, code = frame.f_globals.get("__name__", ""), frame.f_code
        if self.machinery or module.startswith(_MACHINERY):
            self.machinery += 1
        elif of_torch(module):
            if module not in _TRANSPARENT and code.co_name not in _TRANSPARENT_FUNCTIONS.get(module, ()):
                raise NotFollowedError(f"its forward calls {module}.{code.co_qualname}")
        elif module != __name__ and not (code in self.codes and code.co_flags & inspect.CO_GENERATOR):
            self.codes.add(code)
            if (why := why_not_code(frame, _StandIn, Proxy)) is not None:
                raise NotFollowedError(f"{code.co_qualname} {why}")


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"torch.fx cannot trace its forward: {type(error).__name__}: {lines[0]}"


def called_modules(graph: Graph) -> list[str]:
    """The paths of the modules that a graph calls, as often as it does."""
    return [str(node.target) for node in graph.nodes if node.op == "call_module"]


# ---- torch.fx, made to see more


class _InPlace:
    """``x += y`` and its like: torch.fx would take it for ``x = x + y``, which leaves the tensor alone."""

    tracer: Any


def _in_place(function: Any) -> Callable[[Any, Any], Any]:
    return lambda self, other: self.tracer.create_proxy("call_function", function, (self, other), {})


for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or", "xor"):
    _dunder = f"__i{_name}__"
    setattr(_InPlace, _dunder, _in_place(getattr(operator, _dunder)))


class _Attribute(_InPlace, Attribute):
    pass


class _Value(_InPlace, Proxy):
    def __getattr__(self, name: str) -> Any:
        return _Attribute(self, name)


class _Tracer(Tracer):
    """Runs one module's forward; all modules in it are leaves."""

    proxy_buffer_attributes = True

    def __init__(self, trace: _Trace) -> None:
        super().__init__()
        self._trace = trace
        self.lossy: str | None = None

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def proxy(self, node: Node) -> Proxy:
        return _Value(node, self)

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, dict | list | tuple) and type(a) not in (dict, list, tuple, torch.Size):
            self.lossy = f"its forward passes on or returns a {type(a).__name__}"
        return super().create_arg(a)

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        function, arguments = super().create_args_for_root(root_fn, is_module, concrete_args)
        return functools.partial(self._trace.watch, function), arguments


# ---- stand-ins


class _StandIn:
    """A copy of a module, one level deep, that tells what is read of it and keeps what is written to it to itself."""

    def __getattribute__(self, name: str) -> Any:
        value = super().__getattribute__(name)
        trace, path = object.__getattribute__(self, "__dict__")["_syncbn_trace"]
        trace.note(self, path, name, value)
        return value

    def __getattr__(self, name: str) -> Any:
        value = super().__getattr__(name)  # type: ignore[misc]
        if value is None:
            trace, path = object.__getattribute__(self, "__dict__")["_syncbn_trace"]
            trace.note(self, path, name, value)
        return value


class _Closed(_StandIn, nn.Module):
    """Stands in for a module that cannot be copied: it can only be called."""

    def __getattr__(self, name: str) -> Any:
        raise NotFollowedError(f"its forward reads {name} of a module whose class does not allow to be watched")


_stand_in_classes: dict[type, type] = {}


def _stand_in(module: nn.Module, trace: _Trace, path: str, made: dict[nn.Module, nn.Module]) -> nn.Module:
    if module in made:
        return made[module]
    original = type(module)
    if not _can_be_derived_from(original):
        if not path:
            raise NotFollowedError(f"its class {original.__name__} does not allow to be watched")
        made[module] = closed = object.__new__(_Closed)
        object.__getattribute__(closed, "__dict__")["_syncbn_trace"] = trace, path
        nn.Module.__init__(closed)
        return closed
    if original not in _stand_in_classes:
        _stand_in_classes[original] = type(original.__name__, (_StandIn, original), {"__module__": __name__})
    copy: nn.Module = object.__new__(_stand_in_classes[original])
    made[module] = copy
    own = object.__getattribute__(copy, "__dict__")
    own.update({name: _copied(value) for name, value in vars(module).items()})
    own["_syncbn_trace"] = trace, path
    own["_modules"] = {
        name: None if child is None else _stand_in(child, trace, f"{path}.{name}" if path else name, made)
        for name, child in module._modules.items()
    }
    return copy


def _can_be_derived_from(cls: type) -> bool:
    """Whether a subclass comes to life without anybody hearing of it."""
    quiet = "__init_subclass__" not in {name for base in cls.__mro__[:-1] for name in vars(base)}
    return type(cls) is type and quiet and not issubclass(cls, torch.jit.ScriptModule)


def _copied(value: Any) -> Any:
    """Containers are copied, so that nobody sees what forward puts into them."""
    if type(value) in (dict, OrderedDict):
        return type(value)((key, _copied(each)) for key, each in value.items())
    return type(value)(map(_copied, value)) if type(value) in (list, set) else value


def _contents(root: nn.Module) -> list[Any]:
    """What is in a tree of stand-ins, to see later whether it is still so."""
    return [_identities(object.__getattribute__(each, "__dict__")) for each in root.modules()]


def _identities(value: Any) -> Any:
    if type(value) in (dict, OrderedDict):
        return [(key, _identities(each)) for key, each in value.items()]
    return [_identities(each) for each in value] if type(value) is list else id(value)


def snapshot(value: Any, what: str) -> Any:
    """``value`` as it is now, to be compared later.

    Raises:
        NotFollowedError: it has parts that can change and cannot be compared.
    """
    if isinstance(value, PLAIN) or (is_code(value) and not isinstance(value, types.MethodType)):
        return value
    if type(value) in (dict, OrderedDict):
        return type(value)((key, snapshot(each, what)) for key, each in value.items())
    if type(value) in (list, tuple, set, frozenset, torch.Size):
        return type(value)([snapshot(each, what) for each in value])
    raise NotFollowedError(f"{what}, a {type(value).__name__}, which may change")


# ---- what may run


_INTERNAL = frozenset(vars(nn.Module())) - {"training", "_modules"}
_MACHINERY = ("torch.fx", "torch.overrides")  # writes the graph
_TRANSPARENT = {"torch.nn.functional", "torch.functional", "torch.nn.modules.container"}
_TRANSPARENT_FUNCTIONS = {
    "torch.nn.modules.module": ("__getattr__", "children", "named_children"),
    "torch._jit_internal": ("is_scripting", "fn"),
    "torch._VF": ("__getattr__",),
    "torch": ("_assert",),
}


def tensors(graph: Graph) -> set[Node]:
    """The nodes whose values are certainly tensors, or what modules return, which is not known."""
    found: set[Node] = set()
    for node in graph.nodes:  # operands come before results
        if _gives_tensor(node, found):
            found.add(node)
    return found


def _gives_tensor(node: Node, tensors: set[Node]) -> bool:
    first = node.args[0] if node.args else None
    of_tensor = isinstance(first, Node) and first in tensors
    if node.op == "placeholder":
        return any(user.op == "call_module" and user.args[:1] == (node,) for user in node.users)
    if node.op == "call_method":
        return of_tensor and hasattr(Tensor, str(node.target)) and node.target not in _GIVE_NO_TENSOR
    if node.op != "call_function":
        return node.op in ("call_module", "get_attr")
    module = getattr(node.target, "__module__", None) or ""
    if module == "_operator" and node.target is not operator.getitem:
        return any(isinstance(each, Node) and each in tensors for each in node.args)
    if node.target is operator.getitem:
        return of_tensor and isinstance(first, Node) and first.op != "call_module"
    return of_tensor and node.target is not getattr and (not module or of_torch(module))


_GIVE_NO_TENSOR = {"size", "dim", "ndimension", "item", "numel", "nelement", "stride", "tolist", "storage_offset"}
_GIVE_NO_TENSOR |= {
    "get_device",
    "element_size",
    "data_ptr",
    "type",
    "is_contiguous",
    "is_floating_point",
    "is_complex",
}
