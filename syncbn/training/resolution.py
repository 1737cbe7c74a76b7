"""Resolving a configuration without the environment's values: they may be secrets, and belong to one machine.

``${oc.env:NAME}`` is how a configuration takes a password or a token without holding it. What is written to a file, or
shown, keeps it as it stands.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict, read_write
from omegaconf.errors import OmegaConfBaseException
from omegaconf.resolvers import oc

_RESOLVER = "oc.env"


class _Environment:
    """Whether the environment was asked since ``asked`` was set to False."""

    def __init__(self) -> None:
        self.asked = False

    def __call__(self, *arguments: Any) -> Any:
        self.asked = True
        return oc.env(*arguments)


def resolve_but_environment(cfg: DictConfig) -> DictConfig:
    """A copy in which every interpolation is resolved, except those whose value comes from the environment, directly or
    by another key: these stand in it as they were written."""
    copy = cfg.copy()
    with _watched() as environment:
        _resolve(copy, environment, keep_all=True)
    return copy


def resolve_what_is_set(cfg: DictConfig) -> None:
    """Resolves all interpolations in place, except those of environment variables that are not set here.

    A run's logger may have been given a token that nobody needs in order to look at the run's results.

    Raises:
        OmegaConfBaseException: another interpolation cannot be resolved.
    """
    with _watched() as environment:
        _resolve(cfg, environment, keep_all=False)


@contextmanager
def _watched() -> Iterator[_Environment]:
    environment = _Environment()
    OmegaConf.register_new_resolver(_RESOLVER, environment, replace=True)
    try:
        yield environment
    finally:
        OmegaConf.register_new_resolver(_RESOLVER, oc.env, replace=True)


def _resolve(node: DictConfig | ListConfig, environment: _Environment, keep_all: bool) -> None:
    if node._is_none() or node._is_missing():
        return
    keys: list[Any] = list(node.keys()) if isinstance(node, DictConfig) else list(range(len(node)))
    for key in keys:
        if OmegaConf.is_missing(node, key):
            continue
        if OmegaConf.is_interpolation(node, key):
            environment.asked = False
            try:
                value = node[key]
            except OmegaConfBaseException:
                if environment.asked:
                    continue
                raise
            if environment.asked and keep_all:
                continue
            with read_write(node), open_dict(node):
                node[key] = value
        child = node._get_node(key)
        if isinstance(child, DictConfig | ListConfig):
            _resolve(child, environment, keep_all)
