"""Which model is meant: the demo that ships with us, a local folder, or a Hugging Face id."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cluster.config import Settings
from cluster.environment import PACKAGES
from cluster.errors import CheckpointError

DEMO_NAME = "foretoken-demo"
DEMO_PATH = PACKAGES / "workers" / "demo" / "model"


@dataclass(frozen=True)
class Model:
    """A checkpoint on this machine and the name that clients use for it."""

    name: str
    path: Path


def find_model(settings: Settings) -> Model:
    """The model that the settings name, fetched where it is not here yet (with progress on standard error).

    Raises `CheckpointError`, or what `cluster.control.fetch.resolve_model` raises.
    """
    if settings.model is None:
        if not (DEMO_PATH / "config.json").is_file():
            raise CheckpointError(f"the demo model is not in {DEMO_PATH}: install Foretoken again, or name a model")
        return Model(settings.served_model_name or DEMO_NAME, DEMO_PATH)

    from cluster.control.fetch import resolve_model

    path = resolve_model(settings.model, revision=settings.revision)
    return Model(settings.served_model_name or default_name(settings.model), path)


def default_name(model: str) -> str:
    """A hub id is its own name; a folder goes by its last part."""
    folder = Path(model).expanduser()
    return folder.resolve().name if folder.is_dir() else model
