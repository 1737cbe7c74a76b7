"""norm.group_size and norm.statistics_batch on the command line."""

import pytest
from hydra.utils import instantiate

from syncbn.training.config import compose_config
from syncbn.training.errors import UserError
from syncbn.training.train import build


@pytest.mark.parametrize(
    ("override", "group_size", "statistics_batch"),
    [
        ("norm=sync", None, None),
        ("norm.group_size=8", 8, None),
        ("norm.group_size=node", "node", None),
        ("norm.statistics_batch=32", None, 32),
    ],
)
def test_they_reach_the_plugin(override, group_size, statistics_batch):
    (plugin,) = instantiate(compose_config([override]).trainer.plugins)
    assert (plugin.group_size, plugin.statistics_batch) == (group_size, statistics_batch)


def test_local_normalization_has_no_groups():
    with pytest.raises(UserError, match=r"norm.group_size: no such key"):
        compose_config(["norm=local", "norm.group_size=8"])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["norm.group_size=0"], "trainer: .*expected group_size to be a whole number of at least 1, or 'node', got 0"),
        (["norm.group_size=2", "norm.statistics_batch=8"], "trainer: .*got group_size and statistics_batch"),
    ],
)
def test_mistakes_are_the_users(overrides, message, tmp_path):
    with pytest.raises(UserError, match=message):
        build(compose_config([*overrides, "trainer=cpu", f"run_dir={tmp_path}"]))
