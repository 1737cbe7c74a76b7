"""docs/operations.md names a test for each fault: these exist."""

from __future__ import annotations

import re

import pytest
from documentation import ROOT


def _named_tests() -> list[tuple[str, str]]:
    """File and function of each test that the page names; "::name" alone belongs to the file before it."""
    text = (ROOT / "docs" / "operations.md").read_text()
    named, file = [], ""
    for path, name in re.findall(r"`(tests/[\w/]+\.py)?::(\w+)`", text):
        file = path or file
        named.append((file, name))
    return named


def test_every_fault_has_a_test() -> None:
    rows = [line for line in (ROOT / "docs" / "operations.md").read_text().splitlines() if line.startswith("| ")]
    faults = [row for row in rows if not row.startswith(("| fault", "| ---"))]
    assert len(faults) > 15
    assert [row for row in faults if "::test_" not in row] == []


@pytest.mark.parametrize(("file", "name"), sorted(set(_named_tests())))
def test_it_exists(file: str, name: str) -> None:
    assert re.search(rf"^def {name}\(", (ROOT / file).read_text(), re.MULTILINE)
