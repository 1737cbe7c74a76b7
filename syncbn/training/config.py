"""Finding, composing and checking the Hydra configuration."""

import functools
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.errors import HydraException, OverrideParseException
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

import syncbn
from syncbn.training.environment import World, loader_workers, run_stamp
from syncbn.training.errors import UserError, did_you_mean, one_line
from syncbn.training.start import find_start

CONFIG_NAME = "train"


def config_dir() -> Path:
    """The folder of the configuration: inside the package when installed, beside it in a checkout.

    Raises:
        UserError: there is neither.
    """
    package = Path(syncbn.__file__).resolve().parent
    for folder in (package / "conf", package.parent / "conf"):
        if (folder / f"{CONFIG_NAME}.yaml").is_file():
            return folder
    raise UserError(f"no conf/{CONFIG_NAME}.yaml in {package} or {package.parent}: reinstall syncbn")


def register_resolvers() -> None:
    """What the configuration asks of the environment, as `${syncbn.devices:}` and so on."""
    resolvers: dict[str, Callable[..., Any]] = {
        "syncbn.devices": lambda: World.from_environment().local_size,
        "syncbn.nodes": lambda: World.from_environment().num_nodes,
        "syncbn.stamp": run_stamp,
        "syncbn.workers": loader_workers,
        "syncbn.count": count,
    }
    for name, resolver in resolvers.items():
        OmegaConf.register_new_resolver(name, resolver, replace=True)


def count(items: Sequence[Any] | None) -> int | None:
    """How many there are, or None where that is not known yet: `${syncbn.count:${class_names}}`."""
    return None if items is None else len(items)


def compose_config(overrides: list[str]) -> DictConfig:
    """The job's configuration as `syncbn-train` would see it, without running anything.

    Raises:
        UserError: an override is wrong.
    """
    register_resolvers()
    try:
        with initialize_config_dir(str(config_dir()), version_base="1.3"):
            return compose(CONFIG_NAME, overrides)
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(explain(error)) from error
    except ValueError as error:  # Hydra's bare answer to a group that is set to null
        raise UserError(f"{error}: a group cannot be null, see {config_dir()} for its options") from error


def explain(error: BaseException) -> str:
    """One line for an error of Hydra or OmegaConf, with the nearest existing key for a misspelt one."""
    message = str(error)
    if isinstance(error.__cause__, OmegaConfBaseException) and str(error.__cause__) not in message:
        message = f"{message}\n{error.__cause__}"
    match = re.search(r"Could not override '([^']+)'", message)
    if match and ("not in struct" in message or "No match in the defaults list" in message):
        key = match[1]
        return f"{key}: no such key.{did_you_mean(key, _known_keys())}"
    if isinstance(error, OverrideParseException):
        message = f"{error.override}: {message}"
    message = message.split("Config search path")[0]
    lines = [line for line in message.splitlines() if not line.strip().startswith(("object_type=", "full_key:"))]
    return one_line("\n".join(lines))


def check(cfg: DictConfig) -> None:
    """Checks that need no model and no device; the rest is up to what the configuration builds.

    Raises:
        UserError: a value cannot be used.
    """
    check_values(cfg)
    find_start(cfg)


def check_values(cfg: DictConfig) -> None:
    """The same without the checkpoints, which may be large.

    Raises:
        UserError: a value cannot be used.
    """
    try:
        OmegaConf.resolve(cfg.copy())
    except OmegaConfBaseException as error:
        raise UserError(explain(error)) from error
    if missing := list(_missing(OmegaConf.to_container(cfg, resolve=False))):
        raise UserError(f"{', '.join(missing)} must be given")
    if not isinstance(cfg.seed, int) or not 0 <= cfg.seed < 2**32:
        raise UserError(f"seed must be a whole number from 0 to 2**32 - 1, got {cfg.seed!r}")
    run_dir = Path(cfg.run_dir)
    if run_dir.exists() and not run_dir.is_dir():
        raise UserError(f"run_dir: {run_dir} is a file; give the name of a folder")


def _missing(node: Any, path: str = "") -> Iterator[str]:
    """The keys that only the user can fill in, `???` in the configuration."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield from _missing(value, f"{path}.{key}" if path else str(key))
    elif node == MISSING:
        yield path


@functools.cache
def _known_keys() -> tuple[str, ...]:
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        groups = [folder.name for folder in config_dir().iterdir() if folder.is_dir()]
        return (*groups, *_paths(compose(CONFIG_NAME)))


def _paths(cfg: DictConfig, prefix: str = "") -> Iterator[str]:
    for key in map(str, cfg):
        yield f"{prefix}{key}"
        node = cfg._get_node(key)
        if isinstance(node, DictConfig) and not node._is_interpolation() and not node._is_none():
            yield from _paths(node, f"{prefix}{key}.")
