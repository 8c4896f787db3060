"""Which Foretoken this is."""

from __future__ import annotations

import importlib.metadata
import tomllib
from pathlib import Path


def version() -> str:
    """The installed package's version; of a source tree that is not installed, such as a Ray job's, the tree's."""
    try:
        return importlib.metadata.version("foretoken")
    except importlib.metadata.PackageNotFoundError:
        pyproject = Path(__file__).parents[1] / "pyproject.toml"
        found: str = tomllib.loads(pyproject.read_text())["project"]["version"]
        return found
