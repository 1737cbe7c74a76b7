"""class_names and num_classes: said once, for model and task alike."""

from types import SimpleNamespace

import pytest

from syncbn.training.config import compose_config
from syncbn.training.errors import UserError
from syncbn.training.train import name_classes

OF_THE_DATA = SimpleNamespace(class_names=("background", "cat", 3))


def test_left_alone_they_are_those_of_the_data():
    cfg = compose_config([])
    assert cfg.num_classes is None
    name_classes(cfg, OF_THE_DATA)
    assert cfg.class_names == ["background", "cat", "3"]
    assert cfg.num_classes == cfg.model.num_classes == cfg.task.model.num_classes == 3
    assert cfg.task.class_names == ["background", "cat", "3"]


def test_they_can_be_named_otherwise():
    cfg = compose_config(["class_names=[nothing,Katze,drei]"])
    name_classes(cfg, OF_THE_DATA)
    assert cfg.task.class_names == ["nothing", "Katze", "drei"]
    assert cfg.num_classes == 3


def test_another_number_than_the_data_has_is_refused():
    with pytest.raises(UserError, match=r"the data has 3 classes \(background, cat, 3\), but 2 are named \(a, b\)"):
        name_classes(compose_config(["class_names=[a,b]"]), OF_THE_DATA)


def test_data_that_names_none_is_enough_where_nobody_asks():
    with pytest.raises(UserError, match="class_names: the data names no classes"):
        name_classes(compose_config([]), SimpleNamespace())
    cfg = compose_config(["model.num_classes=2", "task.class_names=[a,b]"])
    name_classes(cfg, SimpleNamespace())
    assert cfg.class_names is None
