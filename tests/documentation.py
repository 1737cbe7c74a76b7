"""The code that stands in the README and in docs/, for the tests to run."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent


def blocks(page: str, language: str = "python") -> list[str]:
    """The code of one language on a page, such as "docs/groups.md", block by block."""
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
