"""Which layers of a model are meant: finding its batch normalization, and include= and exclude=."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

from torch import nn

from .recipes import is_batch_norm

Selector = str | type[nn.Module]
Selection = Selector | Iterable[Selector] | None


@dataclass(frozen=True)
class Found:
    """A layer and where it stands in the model."""

    layer: nn.Module
    name: str  # qualified, the first one if the layer stands at several places
    path_names: set[str] = field(default_factory=set)  # its own names and those of the containers around it
    containers: list[nn.Module] = field(default_factory=list)  # itself included


def batch_norms(module: nn.Module) -> list[Found]:
    """All layers of ``module`` that form batch statistics, each once, in module order."""
    return find(module, is_batch_norm)


def find(module: nn.Module, wanted: Callable[[nn.Module], bool]) -> list[Found]:
    """All modules in ``module`` that are ``wanted``, each once, in module order."""
    found: dict[nn.Module, Found] = {}
    for path in _paths("", module, []):
        name, layer = path[-1]
        if wanted(layer):
            each = found.setdefault(layer, Found(layer, name))
            each.path_names.update(name for name, _ in path)
            each.containers.extend(container for _, container in path)
    return list(found.values())


_Path = list[tuple[str, nn.Module]]


def _paths(name: str, module: nn.Module, above: _Path) -> Iterator[_Path]:
    """Every way from the model to a module in it: names and modules."""
    if any(module is container for _, container in above):
        return
    path = [*above, (name, module)]
    yield path
    for child_name, child in module._modules.items():
        if child is not None:
            yield from _paths(_child_name(name, module, child_name), child, path)


_WRAPPERS_CHILDREN = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}


def _child_name(name: str, module: nn.Module, child_name: str) -> str:
    """The child's qualified name in the model before it was wrapped: what patterns are written for."""
    wrapped = child_name in _WRAPPERS_CHILDREN or isinstance(
        module, nn.parallel.DistributedDataParallel | nn.DataParallel
    )
    return name if wrapped else f"{name}.{child_name}" if name else child_name


_reasons_for_leaving: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()


def reason_for_leaving(layer: nn.Module) -> str | None:
    """Why ``convert`` has left the layer out, in words; None where it has not, or nobody remembers."""
    return _reasons_for_leaving.get(layer)


def remember_leaving(reasons: dict[nn.Module, str]) -> None:
    _reasons_for_leaving.update(reasons)


def forget_leaving(layer: nn.Module) -> None:
    _reasons_for_leaving.pop(layer, None)


def select(found: list[Found], include: Selection, exclude: Selection) -> tuple[list[Found], dict[nn.Module, str]]:
    """The layers to convert, and why not the others."""
    chosen, left = divide(found, include, exclude)
    for each in chosen:
        forget_leaving(each.layer)
    return chosen, left


def divide(found: list[Found], include: Selection, exclude: Selection) -> tuple[list[Found], dict[nn.Module, str]]:
    """The layers that are meant, and why not the others."""
    included, excluded = _selectors(include, "include"), _selectors(exclude, "exclude")
    _require_matches(found, [*(included or []), *(excluded or [])])
    left: dict[nn.Module, str] = {}
    chosen = []
    for each in found:
        leaving = next((s for s in excluded or [] if _matches(each, s)), None)
        if leaving is not None:
            left[each.layer] = f"left out by exclude={_spelled(leaving)}"
        elif included is not None and not any(_matches(each, s) for s in included):
            left[each.layer] = f"not named by include={', '.join(map(_spelled, included))}"
        else:
            chosen.append(each)
    return chosen, left


def _selectors(selection: Selection, argument: str) -> list[Selector] | None:
    if selection is None:
        return None
    selectors = [selection] if isinstance(selection, str | type) else list(selection)
    for selector in selectors:
        if not isinstance(selector, str) and not (isinstance(selector, type) and issubclass(selector, nn.Module)):
            raise TypeError(
                f"expected {argument} to be a layer's name, a pattern such as 'backbone.*', a module class, "
                f"or a list of these, got {selector!r}"
            )
    return selectors


def _matches(each: Found, selector: Selector) -> bool:
    if isinstance(selector, str):
        return any(fnmatch.fnmatchcase(name, selector) for name in each.path_names if name)
    return any(isinstance(container, selector) for container in each.containers)


def _spelled(selector: Selector) -> str:
    return repr(selector) if isinstance(selector, str) else selector.__name__


def _require_matches(found: list[Found], selectors: list[Selector]) -> None:
    """Raises for a name that matches nothing. A class may be absent: a script may serve several models."""
    names = sorted({name for each in found for name in each.path_names if name})
    for selector in selectors:
        if isinstance(selector, str) and not any(_matches(each, selector) for each in found):
            near = difflib.get_close_matches(selector, names, n=5, cutoff=0.3) or names[:5]
            raise ValueError(
                f"{selector!r} matches no batch normalization layer of this model; near it are: "
                f"{', '.join(near) or 'none'}"
            )
