"""``fuse``: a normalization and the activation after it become one layer, in the model as it is.

The layer applies the activation; the activation module, where it served nothing else, lets its input pass. Where a
residual is added in between, or the activation is a function, the module around them gets a forward without these
steps. Objects stay the same objects: what changes is their class, as in ``convert``.
"""

from __future__ import annotations

import copy
import importlib
import linecache
import logging
import sys
import types
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any, TypeVar

from torch import nn
from torch.fx import Graph

from .layer import SyncBatchNorm, describe_layer
from .reading import found_again
from .sites import NO_ACTIVATION, PASSES, Match, Owner, Sites
from .tracing import Read

Module = TypeVar("Module", bound=nn.Module)

_logger = logging.getLogger(__name__)


def fuse(module: Module) -> Module:
    """Lets the ``SyncBatchNorm`` layers of ``module`` apply the activations that follow them, in place.

    BN→activation and BN→add→activation become one layer, for ReLU, LeakyReLU and SiLU as modules or functions. Each
    module's own forward is followed with ``torch.fx``, its children being called as before: with their hooks,
    wrappers and checkpointing. Neighbours in an ``nn.Sequential`` need not be followed. What cannot be proved to change
    no output and no gradient stays unfused; the logger "syncbn.fusion" says why. Objects, parameters, state_dict and
    training mode stay. ``revert`` undoes it; a second time does no harm.

    What forward was seen to depend on (an attribute that it branches on) is compared at each call. Where it has
    changed, the call raises, and asks to fuse again.

    Returns:
        ``module`` itself.

    Raises:
        ValueError: there is no SyncBatchNorm in it.
    """
    layers = [each for each in module.modules() if isinstance(each, SyncBatchNorm)]
    if not layers:
        raise ValueError("there is no SyncBatchNorm in the module: call syncbn.convert(model) first")
    _undo(module, _whole(module))
    sites = Sites(module)
    for owner in sites.owners:
        _fuse_owner(owner, sites)
    _report(layers, sites)
    return module


def unfuse(module: nn.Module) -> None:
    """Undoes ``fuse``.

    Raises:
        ValueError: something in ``module`` was fused with something outside of it.
        TypeError: another library has changed a class since.
    """
    whole = _whole(module)
    torn = [name or "the module" for name, each in module.named_modules() if PART in vars(each) and each not in whole]
    if torn:
        raise ValueError(
            f"{', '.join(torn[:5])}: fused by syncbn.fuse with modules outside of this one. Revert the model that was "
            f"fused"
        )
    covered = [type(each).__name__ for each in whole if vars(each)[PART].swapped and _UNFUSED not in vars(type(each))]
    if covered:
        raise TypeError(
            f"cannot undo syncbn.fuse for {', '.join(covered)}: another library has changed the class since. Undo "
            f"that first"
        )
    _undo(module, whole)


def _report(layers: list[SyncBatchNorm], sites: Sites) -> None:
    for layer in layers:
        if layer._fused_activation is None:
            why = sites.reasons.get(layer, NO_ACTIVATION)
            level = logging.DEBUG if why == NO_ACTIVATION else logging.INFO
            _logger.log(level, "%s is not fused: %s", sites.names[layer][0] or "the layer", why)
    fused = sum(PART in vars(layer) for layer in layers)
    _logger.info("%d of %d SyncBatchNorm layers are fused with the activation after them", fused, len(layers))


# ---- what is fused with what


@dataclass(frozen=True)
class Part:
    """What ``fuse`` keeps on a module that it has changed: all that pickles and ``unfuse`` need to know."""

    group: str  # the same for all that was fused together
    role: str  # "layer", "activation" or "owner"
    needs: str | None = None  # of which role there must be one, for this one to be undone
    before: tuple[tuple[str, Any], ...] = ()  # a layer's own attributes that have been replaced
    reads: tuple[Read, ...] = ()  # what an owner's forward depends on
    code: Code | None = None  # an owner's forward, where it is not the original one
    swapped: bool = True  # whether the class was changed
    instead_of: nn.Module | None = None  # the activation in whose place this one lets its input pass


PART = "_fusion"


def _whole(module: nn.Module) -> set[nn.Module]:
    """The fused modules of which all that is to be undone together is inside ``module``."""
    fused = {each: vars(each)[PART] for each in module.modules() if PART in vars(each)}
    there = {(part.group, part.role) for part in fused.values()}
    torn = {part.group for part in fused.values() if part.needs and (part.group, part.needs) not in there}
    return {each for each, part in fused.items() if part.group not in torn}


def _fuse_owner(owner: Owner, sites: Sites) -> None:
    matches = list(owner.matches.values())
    passing = [match for match in matches if _can_pass(match, owner, sites)]
    if len(passing) == len(matches):
        _fuse_by_passing(owner, passing)
        return
    try:
        code = rewritten(owner, matches)
    except ValueError as error:
        for match in matches:
            if match not in passing:
                sites.reasons[owner.module.get_submodule(match.site.layer)] = str(error)
        _fuse_by_passing(owner, passing)
        return
    group = uuid.uuid4().hex
    _become(owner.module, Part(group, "owner", "layer", reads=owner.reads(matches, passing=False), code=code))
    for match in matches:
        _fuse_layer(owner, match, group, needs="owner")


def _can_pass(match: Match, owner: Owner, sites: Sites) -> bool:
    return match.sum is None and match.site.module is not None and sites.whole_uses(owner, match.site.module)


def _fuse_by_passing(owner: Owner, matches: list[Match]) -> None:
    """The layers apply the activations, whose modules do nothing any more; forward stays."""
    if not matches:
        return
    group = uuid.uuid4().hex
    _become(owner.module, Part(group, "owner", "layer", reads=owner.reads(matches, passing=True)))
    for path in dict.fromkeys(str(match.site.module) for match in matches):
        # The activation itself is left alone: other models may share it.
        parent, _, name = path.rpartition(".")
        children = owner.module.get_submodule(parent)._modules
        children[name] = _passing(children[name], group)
    for match in matches:
        _fuse_layer(owner, match, group, needs="activation")


def _passing(activation: nn.Module | None, group: str) -> nn.Module:
    """A copy of an activation that lets its input pass."""
    assert activation is not None  # it was found there
    passing = copy.copy(activation)
    _become(passing, Part(group, "activation", "layer", instead_of=activation))
    return passing


def _fuse_layer(owner: Owner, match: Match, group: str, needs: str) -> None:
    layer = owner.module.get_submodule(match.site.layer)
    if not isinstance(layer, SyncBatchNorm):
        raise TypeError(f"expected a SyncBatchNorm, got {type(layer).__name__}")
    before = tuple((name, vars(layer)[name]) for name in _ACTIVATION if name in vars(layer))
    vars(layer)[PART] = Part(group, "layer", needs, before, swapped=False)
    layer.fuse_activation(match.site.activation, match.site.slope)
    _describe_again(layer)


_ACTIVATION = ("_fused_activation", "_fused_slope")


def _undo(root: nn.Module, fused: set[nn.Module]) -> None:
    passing = {each: original for each in fused if (original := vars(each)[PART].instead_of) is not None}
    for module in list(root.modules()):
        for name, child in module._modules.items():
            if child in passing:
                module._modules[name] = passing[child]
    for module in fused:
        part = vars(module).pop(PART)
        if part.swapped:
            object.__setattr__(module, "__class__", vars(type(module))[_UNFUSED])
        elif isinstance(module, SyncBatchNorm):
            for name in _ACTIVATION:
                vars(module).pop(name, None)
            vars(module).update(part.before)
            _describe_again(module)


def _describe_again(layer: SyncBatchNorm) -> None:
    """The processes compare what the layers do: one that has not fused must be told from one that has."""
    name = layer._exchange._layers[layer._index].partition("(")[0]
    layer._exchange.describe_again(layer._index, describe_layer(layer, name))


# ---- a forward made from a graph


@dataclass(frozen=True)
class Code:
    """The source of a forward, and where its globals are found: name, module and name in there."""

    source: str
    globals: tuple[tuple[str, str, str], ...]

    def function(self, original: Any) -> Any:
        """The forward, with the argument names and defaults of ``original``."""
        file = f"<syncbn.fuse of {original.__qualname__} {abs(hash(self.source))}>"
        linecache.cache[file] = len(self.source), None, self.source.splitlines(True), file
        namespace = {name: _imported(module, path) for name, module, path in self.globals}
        exec(compile(self.source, file, "exec"), namespace)
        function = namespace["forward"]
        function.__defaults__ = original.__defaults__
        return function


def _imported(module: str, path: str) -> Any:
    found: Any = importlib.import_module(module)
    for part in path.split(".") if path else ():
        found = getattr(found, part)
    return found


def rewritten(owner: Owner, matches: list[Match]) -> Code:
    """The owner's forward without the sums and activations that the layers take over.

    Raises:
        ValueError: it would not be the same forward otherwise; says why.
    """
    if owner.plain_sequential:
        raise ValueError("its activation is used elsewhere, too, and the module around it is a Sequential")
    if owner.followed.lossy is not None:
        raise ValueError(owner.followed.lossy)
    forward = type(owner.module).forward
    if hasattr(forward, "__wrapped__") or forward.__kwdefaults__ or forward.__code__.co_kwonlyargcount:
        raise ValueError("its forward is decorated, or has arguments that can only be given by name")
    train, eval_ = owner.graphs
    if _code(train) != _code(eval_):
        raise ValueError("its forward differs between train() and eval()")
    for match in matches:
        match.rewrite(train)
    return _code(train)


def _code(graph: Graph) -> Code:
    for node in graph.nodes:
        node.type = None
        if node.op == "placeholder":
            node.args = ()  # the defaults are those of the original
    python = graph.python_code("self")
    used = _names_in(compile(python.src, "forward", "exec"))
    return Code(python.src, tuple(_found(name, value) for name, value in python.globals.items() if name in used))


def _names_in(code: types.CodeType) -> set[str]:
    inner = [each for each in code.co_consts if isinstance(each, types.CodeType)]
    return set(code.co_names).union(*map(_names_in, inner))


def _found(name: str, value: Any) -> tuple[str, str, str]:
    """Where another process finds a global."""
    if isinstance(value, types.ModuleType):
        return name, value.__name__, ""
    if name in ("inf", "nan"):
        return name, "math", name
    if name == "NoneType":
        return name, "types", name
    module, path = getattr(value, "__module__", None), getattr(value, "__qualname__", "")
    if module in sys.modules and found_again(value):
        return name, module, path
    raise ValueError(f"its forward uses {name}, which has no place from where it could be imported")


# ---- the classes


_UNFUSED = "_syncbn_unfused"
_made: dict[tuple[type, str, Code | None], type] = {}


def _become(module: nn.Module, part: Part) -> None:
    vars(module)[PART] = part
    object.__setattr__(module, "__class__", _fused_class(type(module), part))


def _fused_class(original: type, part: Part) -> type:
    """The class for fused modules of class ``original`` in this role: one and the same each time."""
    key = original, part.role, part.code
    if key not in _made:
        members = {
            "__module__": __name__,
            "__qualname__": f"Fused{original.__name__}",
            "__doc__": f"``{original.__qualname__}`` in a model whose activations ``syncbn.fuse`` has fused.",
            "__reduce_ex__": _reduce,
            "forward": _pass(original) if part.role == "activation" else _forward(original, part.code),
            _UNFUSED: original,
        } | ({PASSES: True} if part.role == "activation" else {})
        name = f"Fused{original.__name__}"
        _made[key] = types.new_class(name, (original,), exec_body=lambda namespace: namespace.update(members))
    return _made[key]


def _pass(original: type) -> Callable[..., Any]:
    @wraps(original.forward)  # type: ignore[attr-defined]
    def forward(self: nn.Module, input: Any) -> Any:
        """The layer before has applied the activation already."""
        return input if PART in vars(self) else original.forward(self, input)  # type: ignore[attr-defined]

    return forward


def _forward(original: type, code: Code | None) -> Callable[..., Any]:
    function = original.forward if code is None else code.function(original.forward)  # type: ignore[attr-defined]

    @wraps(original.forward)  # type: ignore[attr-defined]
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if PART not in vars(self):  # one that somebody has made of the fused module's class
            return original.forward(self, *args, **kwargs)  # type: ignore[attr-defined]
        for read in vars(self)[PART].reads:
            if not read.still_true(self):
                raise RuntimeError(
                    f"{type(self).__name__}: {_spelled(read)} is not what it was when syncbn.fuse followed forward, "
                    f"which depends on it. Call syncbn.fuse(model) again"
                )
        return function(self, *args, **kwargs)

    return forward


def _spelled(read: Read) -> str:
    *path, name = ("self", *read.names)
    return f"the class of {'.'.join(path)}" if name == "__class__" else ".".join((*path, name))


def _reduce(self: nn.Module, protocol: Any) -> Any:
    """Pickles the module as one of its original class, which another process can import."""
    fused = type(self)
    original = vars(fused).get(_UNFUSED)
    if original is None:
        return object.__reduce_ex__(self, protocol)
    make, arguments, *rest = original.__reduce_ex__(self, protocol)
    arguments = tuple(original if each is fused else each for each in arguments)
    return rebuild, (original, vars(self)[PART], make, arguments), *rest


def rebuild(original: type, part: Part, make: Callable[..., nn.Module], arguments: tuple[Any, ...]) -> nn.Module:
    """The inverse: pickles and checkpoints call it by this name."""
    module = make(*arguments)
    object.__setattr__(module, "__class__", _fused_class(original, part))
    return module
