"""docs/launch.md: its commands are commands, and its options exist."""

import re
import shlex

import pytest
from documentation import ROOT, blocks
from jobs import REPOSITORY

from syncbn.training.config import check, compose_config
from syncbn.training.launch import arguments_for_hydra
from syncbn.training.multinode import meeting_of, parse

PAGE = "docs/launch.md"
TEXT = (ROOT / PAGE).read_text()
COMMANDS = [shlex.split(line, comments=True) for block in blocks(PAGE, "sh") for line in block.strip().splitlines()]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_composes(command):
    script = next(word for word in command if word.startswith("launch/"))
    assert (REPOSITORY / script).is_file()
    arguments = command[command.index(script) + 1 :]
    if script.endswith("multinode.sh"):
        options, arguments = parse(arguments)
        assert meeting_of(options).max_nodes == 2
    overrides = arguments_for_hydra(arguments)
    assert overrides == arguments
    if "experiment=coco-fcos" not in overrides:  # whose data is not here
        check(compose_config(overrides))


@pytest.mark.parametrize("cell", re.findall(r"^\| (`--.+?`) \|", TEXT, re.MULTILINE))
def test_every_option_of_the_table_exists(cell):
    for option in re.findall(r"`(.+?)`", cell):
        required = ["--nnodes=1", "--rdzv-endpoint=node0"]
        assert parse([*required, option])[1] == []


def test_the_environment_is_the_scripts():
    script = (REPOSITORY / "launch" / "environment.sh").read_text()
    exported = re.findall(r'^export (\w+)="\$\{\1:-(\w+)\}"', script, re.MULTILINE)
    assert len(exported) == script.count("export ") == 5
    for name, value in exported:
        assert f"`{name}={value}`" in TEXT
