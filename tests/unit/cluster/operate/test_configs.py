from __future__ import annotations

from pathlib import Path

import pytest

from cluster.config import Settings, load

ROOT = Path(__file__).resolve().parents[4]
FILES = sorted((ROOT / "configs" / "cluster").glob("*.yaml"))


def test_there_are_cluster_configs() -> None:
    assert "local.yaml" in [path.name for path in FILES]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_each_cluster_config_loads(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in Settings.model_fields:
        monkeypatch.delenv(f"FORETOKEN_{name.upper()}", raising=False)
    settings = load(config=path)
    assert settings.attention_workers >= 1
    assert settings.expert_workers >= 1
    assert {line.origin for line in settings.describe()} == {str(path), "default"}


def test_the_local_config_is_the_demo_on_two_and_two_workers() -> None:
    settings = load(config=ROOT / "configs" / "cluster" / "local.yaml")
    assert (settings.model, settings.attention_workers, settings.expert_workers) == (None, 2, 2)
    assert settings.local is None  # so that a job joins the Ray that it was sent to
