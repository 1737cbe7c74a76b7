"""Where a model applies an activation to a normalization's output, and what must be so for the two to become one.

A site is BN→activation or BN→add→activation in the graph of one module's forward. What cannot be proved is refused,
with the reason in words.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import Graph, Node

from .layer import SyncBatchNorm
from .reading import escapes, mentions, methods
from .tracing import Followed, NotFollowedError, Read, called_modules, follow, tensors

NO_ACTIVATION = "no activation follows it"
PASSES = "_passes_its_input"  # the mark of an activation that is left to the layer before


@dataclass(frozen=True)
class Site:
    """A normalization and the activation after it, in one module's forward."""

    layer: str  # the path of the normalization in that module
    activation: str
    slope: float
    module: str | None  # the path of the activation, where it is a module
    added: bool  # whether a residual is added in between
    identities: tuple[str, ...]  # the paths of the nn.Identity modules in between


@dataclass(frozen=True)
class Match:
    """A site's nodes."""

    site: Site
    layer: Node
    activation: Node
    identities: tuple[Node, ...] = ()
    sum: Node | None = None
    residual: Node | None = None

    def rewrite(self, graph: Graph) -> None:
        """Leaves the sum and the activation to the layer."""
        if self.sum is None or self.residual is None:
            self.activation.replace_all_uses_with(self.identities[-1] if self.identities else self.layer)
            graph.erase_node(self.activation)
            return
        x = self.layer.args[0]
        with graph.inserting_before(self.sum):
            fused = graph.call_module(str(self.layer.target), (x, self.residual))
            if _is_in_place(self.sum):  # whose result has the type of what it is added to
                fused = graph.call_method("type_as", (fused, x))
        self.activation.replace_all_uses_with(fused)
        for node in (self.activation, self.sum, *reversed(self.identities), self.layer):
            graph.erase_node(node)


class RefusedError(Exception):
    """Why a normalization stays as it is."""


@dataclass
class Owner:
    """A module whose forward calls normalizations, and what was found there."""

    module: nn.Module
    followed: Followed
    plain_sequential: bool
    matches: dict[str, Match] = field(default_factory=dict)  # by the layer's path
    tensors: set[Node] = field(default_factory=set)  # nodes that are tensors, in both graphs

    @property
    def graphs(self) -> tuple[Graph, Graph]:
        return self.followed.train, self.followed.eval

    def reads(self, matches: list[Match], passing: bool) -> tuple[Read, ...]:
        """What must stay as it is for these sites to be what they are, their activations being let pass or left out."""
        reads = [*self.followed.reads]
        for site in (match.site for match in matches):
            reads.append(Read((*site.layer.split("."), "_fused_activation"), site.activation))
            reads += [Read((*path.split("."), "__class__"), nn.Identity) for path in site.identities]
            if site.module is not None:
                activation = site.module.split(".")
                as_found = type(self.module.get_submodule(site.module))
                reads.append(
                    Read((*activation, PASSES), True) if passing else Read((*activation, "__class__"), as_found)
                )
                if site.activation == "leaky_relu":
                    slope = self.module.get_submodule(site.module).negative_slope
                    reads.append(Read((*activation, "negative_slope"), slope))
        return tuple(reads)


class Sites:
    """All sites of a model, by owner, and the reasons why the other normalizations have none."""

    def __init__(self, root: nn.Module) -> None:
        self._modules = dict(root.named_modules(remove_duplicate=False))
        self.names: dict[nn.Module, list[str]] = {}
        for name, module in self._modules.items():
            self.names.setdefault(module, []).append(name)
        self.reasons: dict[nn.Module, str] = {}
        self.owners: list[Owner] = []
        self._calls = Counter[nn.Module]()  # in the graphs for training, or before forward could not be followed
        self._calls_in_eval = Counter[nn.Module]()
        self._called_elsewhere: set[str] = set()  # names of children's children that code no graph shows may call
        self._taken_apart: set[nn.Module] = set()  # Sequentials whose layers such code may call one by one
        for module in self.names:
            if _calls_others(module) and any(isinstance(each, SyncBatchNorm) for each in module.modules()):
                self._add_owner(module)
        for owner in self.owners:
            self._find(owner)

    def whole_uses(self, owner: Owner, path: str) -> bool:
        """Whether all uses of an activation module are sites without a sum, so that it may cease to do anything."""
        module = owner.module.get_submodule(path)
        direct = [m.site.module for m in owner.matches.values() if m.site.module and m.sum is None]
        sites = [each for each in direct if owner.module.get_submodule(each) is module]
        mine = all(self._owner_of(name) is owner.module for name in self.names[module])
        calls = self._calls[module], self._calls_in_eval[module]
        return mine and calls == (len(sites), len(sites)) and not self._is_called_elsewhere(owner, path)

    # ---- owners

    def _add_owner(self, module: nn.Module) -> None:
        try:
            owner = _own(module)
        except NotFollowedError as error:
            self._add_calls(self._calls, module, error.calls)
            self._add_code_of(module)
            for layer in module.modules():
                if isinstance(layer, SyncBatchNorm) and self._owner_of(self.names[layer][0]) is module:
                    self.reasons[layer] = str(error)
            return
        self.owners.append(owner)
        self._add_calls(self._calls, module, called_modules(owner.followed.train))
        self._add_calls(self._calls_in_eval, module, called_modules(owner.followed.eval))

    @staticmethod
    def _add_calls(counter: Counter[nn.Module], module: nn.Module, paths: list[str]) -> None:
        counter.update(module.get_submodule(path) for path in paths)

    def _add_code_of(self, module: nn.Module) -> None:
        """What the code of a module that could not be followed might do to modules further down."""
        for code in methods(type(module)):
            if escapes(code):
                self._taken_apart.update(module.modules())
            for name, of_self, called in mentions(code):
                if not of_self:
                    self._called_elsewhere.add(name)
                    below = [each for path, each in module.named_modules() if path.rpartition(".")[2] == name]
                    self._taken_apart.update(*(() if called else map(_stations, below)))
                elif not called and (child := module._modules.get(name)) is not None:
                    self._taken_apart.update(_stations(child))

    def _owner_of(self, name: str) -> nn.Module | None:
        """The nearest module above that has a forward."""
        while name:
            name = name.rpartition(".")[0]
            if type(self._modules[name]).forward is not nn.Module.forward:
                return self._modules[name]
        return None

    # ---- sites

    def _find(self, owner: Owner) -> None:
        owner.tensors = set().union(*map(tensors, owner.graphs))
        by_mode = [dict(self._matches(owner, graph)) for graph in owner.graphs]
        for path, match in by_mode[0].items():
            layer = owner.module.get_submodule(path)
            if path in by_mode[1] and by_mode[1][path].site == match.site:
                owner.matches[path] = match
            else:
                self.reasons[layer] = "its output is used otherwise in eval mode"

    def _matches(self, owner: Owner, graph: Graph) -> Iterator[tuple[str, Match]]:
        taken: set[Node] = set()
        for node in reversed(graph.nodes):  # so that of two layers in one sum, the last one gets it
            layer = owner.module.get_submodule(str(node.target)) if node.op == "call_module" else None
            if not isinstance(layer, SyncBatchNorm):
                continue
            try:
                self._require_fusable(owner, node, layer)
                match = _match(owner, node)
                if match.sum in taken:
                    raise RefusedError("the sum after it is fused into another layer")
            except RefusedError as refused:
                self.reasons[layer] = str(refused)
                continue
            if match.sum is not None:
                taken.add(match.sum)
            yield str(node.target), match

    def _require_fusable(self, owner: Owner, node: Node, layer: SyncBatchNorm) -> None:
        path = str(node.target)
        if layer._fused_activation is not None:
            raise RefusedError(f"it applies {layer._fused_activation} already")
        if type(layer).forward is not SyncBatchNorm.forward or "forward" in vars(layer):
            raise RefusedError("it has a forward of its own")
        if type(layer).__call__ is not nn.Module.__call__ or layer._modules or has_hooks(layer):
            raise RefusedError("it has hooks, or modules of its own")
        if len(self.names[layer]) > 1:
            raise RefusedError(f"it stands at several places: {', '.join(self.names[layer])}")
        if self._owner_of(self.names[layer][0]) is not owner.module:
            raise RefusedError("it is called by a module further up")
        if max(self._calls[layer], self._calls_in_eval[layer]) > 1:
            raise RefusedError("it is called more than once")
        if self._is_called_elsewhere(owner, path):
            raise RefusedError("other code may call it, too")
        if len(node.args) != 1 or node.kwargs or not isinstance(node.args[0], Node):
            raise RefusedError("it is called with more than its input")

    def _is_called_elsewhere(self, owner: Owner, path: str) -> bool:
        """Whether code that no graph shows calls a child of ``owner``, by its name or one by one."""
        first, _, below = path.partition(".")
        if owner.module in self._taken_apart or path.rpartition(".")[2] in self._called_elsewhere:
            return True
        other = [code for code in methods(type(owner.module)) if code not in owner.followed.codes]
        return any(
            name == first and of_self and (called or bool(below))
            for code in other
            for name, of_self, called in mentions(code)
        )


def _stations(module: nn.Module) -> Iterator[nn.Module]:
    """The Sequentials whose layers can be reached from ``module`` one by one, from container to container."""
    if isinstance(module, nn.Sequential):
        yield module
    if isinstance(module, nn.Sequential | nn.ModuleList | nn.ModuleDict):
        for child in module.children():
            yield from _stations(child)


def has_hooks(module: nn.Module) -> bool:
    """Whether anything runs before or after the module's forward or backward."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(module, kind, None) for kind in kinds) or nn.modules.module._has_any_global_hook()


def _calls_others(module: nn.Module) -> bool:
    """Whether the module has a forward that may call its children."""
    return bool(module._modules) and type(module).forward is not nn.Module.forward


def _own(module: nn.Module) -> Owner:
    if "forward" in vars(module):
        raise NotFollowedError("a forward was set on the module around it")
    if type(module).forward is nn.Sequential.forward:
        graph = _chain(module)
        return Owner(module, Followed(graph, graph), True)
    of_torch = str(type(module).forward.__module__).startswith("torch.")
    if of_torch or isinstance(module, torch.jit.ScriptModule | torch.fx.GraphModule):
        raise NotFollowedError(f"it stands directly in a {type(module).__name__}")
    return Owner(module, follow(module), False)


def _chain(module: nn.Module) -> Graph:
    """The graph of a Sequential's forward, whatever its children are."""
    graph = Graph()
    node = graph.placeholder("input")
    for name, child in module._modules.items():
        if child is not None:
            node = graph.call_module(name, (node,))
    graph.output(node)
    return graph


# ---- one site


def _match(owner: Owner, layer: Node) -> Match:
    """What follows a normalization.

    Raises:
        RefusedError: no activation does, or its fusion could change something.
    """
    identities, last, user = _to_only_user(owner, layer)
    if (activation := _activation(owner, user, last)) is not None:
        return Match(_site(layer, activation, user, identities, added=False), layer, user, identities)
    residual = _other_operand(user, last)
    if residual is None:
        raise RefusedError(NO_ACTIVATION)
    after, last, user_of_sum = _to_only_user(owner, user)
    activation = _activation(owner, user_of_sum, last)
    if activation is None:
        raise RefusedError(NO_ACTIVATION)
    identities += after
    _require_addable(owner, layer, user, residual, activation)
    if activation[0] == "leaky_relu" and not _works_in_place(owner, user_of_sum):
        # With a residual, backward needs its output, which others may change; unfused, only if it works in place.
        raise RefusedError("a leaky ReLU after a sum is fused only where it works in place")
    site = _site(layer, activation, user_of_sum, identities, added=True)
    return Match(site, layer, user_of_sum, (*identities,), user, residual)


def _site(layer: Node, activation: tuple[str, float], user: Node, identities: tuple[Node, ...], added: bool) -> Site:
    module = str(user.target) if user.op == "call_module" else None
    return Site(str(layer.target), *activation, module, added, tuple(str(node.target) for node in identities))


def _to_only_user(owner: Owner, node: Node) -> tuple[tuple[Node, ...], Node, Node]:
    """The nn.Identity calls after ``node``, the last of them (or ``node``), and what alone reads that one."""
    identities: tuple[Node, ...] = ()
    while True:
        if len(node.users) != 1:
            fusable = any(_activation(owner, each, node) or _other_operand(each, node) for each in node.users)
            raise RefusedError("something else reads its output, too" if fusable else NO_ACTIVATION)
        (user,) = node.users
        if owner.plain_sequential or user.args != (node,) or user.kwargs or not _calls_identity(owner, user):
            return identities, node, user
        identities, node = (*identities, user), user


def _calls_identity(owner: Owner, node: Node) -> bool:
    module = owner.module.get_submodule(str(node.target)) if node.op == "call_module" else None
    return type(module) is nn.Identity and not has_hooks(module) and "forward" not in vars(module)


_MODULES: dict[type, str] = {nn.ReLU: "relu", nn.LeakyReLU: "leaky_relu", nn.SiLU: "silu"}
_FUNCTIONS: dict[Any, str] = {
    F.relu: "relu",
    F.relu_: "relu",
    torch.relu: "relu",
    torch.relu_: "relu",
    F.leaky_relu: "leaky_relu",
    F.leaky_relu_: "leaky_relu",
    F.silu: "silu",
}
_METHODS = {"relu": "relu", "relu_": "relu"}


def _activation(owner: Owner, node: Node, of: Node) -> tuple[str, float] | None:
    """The name and the slope of the activation that a node applies to ``of``; None where it applies none."""
    slope: Any = 0.01
    if node.op == "call_module":
        module = owner.module.get_submodule(str(node.target))
        name = _MODULES.get(type(module))
        if name is None or node.args != (of,) or node.kwargs:
            return None
        if has_hooks(module) or "forward" in vars(module):
            raise RefusedError("there is a hook on the activation after it")
        slope = getattr(module, "negative_slope", slope)
    else:
        name = {"call_function": _FUNCTIONS, "call_method": _METHODS}.get(node.op, {}).get(node.target)
        input, *others = node.args or (node.kwargs.get("input"),)
        if name is None or input is not of:
            return None
        if name == "leaky_relu":
            slope = node.kwargs.get("negative_slope", others[0] if others else slope)
    if not isinstance(slope, int | float) or not slope >= 0:
        raise RefusedError(f"the negative slope of the activation after it is {slope}")
    return name, float(slope)


_SUMS = (operator.add, operator.iadd, torch.add)


def _other_operand(node: Node, of: Node) -> Node | None:
    """What a node adds to ``of``; None where it is no sum of these two."""
    is_sum = node.target in _SUMS if node.op == "call_function" else node.op == "call_method" and _is_add(node)
    if not is_sum or len(node.args) != 2 or node.kwargs.get("alpha", 1) != 1 or node.kwargs.keys() - {"alpha"}:
        return None
    a, b = node.args
    other = b if a is of else a if b is of else None
    return other if isinstance(other, Node) and other is not of else None


def _is_add(node: Node) -> bool:
    return node.target in ("add", "add_")


def _is_in_place(node: Node) -> bool:
    return node.target in (operator.iadd, "add_")


def _require_addable(owner: Owner, layer: Node, sum: Node, residual: Node, activation: tuple[str, float]) -> None:
    """Raises RefusedError unless the layer may be called where the sum is formed, with the residual."""
    if _is_in_place(sum) and sum.args[0] is residual:
        raise RefusedError("it is added to a tensor that is changed in place")
    if residual not in owner.tensors:
        raise RefusedError("what is added to it may not be a tensor")
    if any(node.op == "get_attr" and str(node.target).startswith(f"{layer.target}.") for node in layer.graph.nodes):
        raise RefusedError("its parameters or buffers are used apart from it")
    if _between(layer, sum) and not _is_fresh(owner, layer.args[0], layer):
        raise RefusedError("its input may be changed before the sum is formed")
    if activation[0] == "silu" and not _stays(owner, residual, sum):
        raise RefusedError("what is added to it may be changed before backward, which needs it for SiLU")


def _between(first: Node, last: Node) -> bool:
    """Whether anything happens between two nodes that are not neighbours."""
    node = first.next
    while node is not last:
        if node.op not in ("placeholder", "get_attr") and first not in node.all_input_nodes:
            return True
        node = node.next
    return False


_PRODUCERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_PRODUCERS += (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)  # type: ignore[assignment]


def _is_produced(owner: Owner, node: Any) -> bool:
    """Whether a node is the call of a layer whose output is a new tensor."""
    if not isinstance(node, Node) or node.op != "call_module":
        return False
    module = owner.module.get_submodule(str(node.target))
    return type(module) in _PRODUCERS and not has_hooks(module)


def _is_fresh(owner: Owner, node: Any, user: Node) -> bool:
    """Whether a node's value is a new tensor that only ``user`` knows."""
    return _is_produced(owner, node) and list(node.users) == [user]


def _stays(owner: Owner, residual: Node, sum: Node) -> bool:
    """Whether nobody can change the residual after the sum without autograd's objecting to it anyway."""
    if any(_is_produced(owner, user) for user in residual.users):  # whose backward needs it, too
        return True
    return _is_produced(owner, residual) and list(residual.users) == [sum]


def _works_in_place(owner: Owner, activation: Node) -> bool:
    if activation.op == "call_module":
        return bool(getattr(owner.module.get_submodule(str(activation.target)), "inplace", False))
    return (
        activation.target is F.leaky_relu_ or bool(activation.kwargs.get("inplace")) or activation.args[2:3] == (True,)
    )
