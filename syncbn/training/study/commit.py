"""Which version of the code made a row."""

import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import syncbn


def commit_of_this_code() -> str:
    """The commit of the checkout, with "+" if it has changes; the package's version where there is no checkout."""
    folder = Path(syncbn.__file__).resolve().parent.parent
    if not (folder / ".git").exists():  # installed: what encloses it is another project's checkout
        return _version()
    try:
        return _git(folder, "rev-parse", "--short", "HEAD") + ("+" if _git(folder, "status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return _version()


def _version() -> str:
    try:
        return version("syncbn")
    except PackageNotFoundError:
        return "unknown"


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
