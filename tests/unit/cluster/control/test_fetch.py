"""From a model's name to a folder: local folders, a hub (the real library against a hub of our own), its failures."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest

from cluster.control.fetch import resolve_model
from cluster.errors import CheckpointError, ConfigError
from tests.support.hub import COMMIT, Hub, serving

REPO = "some-org/a-model"
INDEX = "model.safetensors.index.json"


def index_of(*files: str) -> bytes:
    return json.dumps({"weight_map": {f"tensor{i}": file for i, file in enumerate(files)}}).encode()


# ---------------------------------------------------------------------------------------------------- no hub needed


def test_a_local_folder_is_itself(tmp_path: Path) -> None:
    assert resolve_model(str(tmp_path)) == tmp_path


def test_a_revision_of_a_local_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="revision 'v2' says nothing") as caught:
        resolve_model(str(tmp_path), revision="v2")
    assert caught.value.param == "revision"


def test_a_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.touch()
    with pytest.raises(CheckpointError, match="is a file: give the folder"):
        resolve_model(str(file))


@pytest.mark.parametrize("model", ["", "/no/such", "./relative", "a/b/c", "../up", "a//b", "spa ce/x", "a/..", "-x/y"])
def test_what_is_neither_folder_nor_id_is_refused(model: str) -> None:
    with pytest.raises(CheckpointError, match="neither a folder on this machine nor a hub id"):
        resolve_model(model)


# ---------------------------------------------------------------------------------- the real library, a hub of ours

CHILD = """
import json, sys
from cluster.control.fetch import resolve_model
from cluster.errors import ForetokenError
seen = []
try:
    folder = resolve_model(sys.argv[1], progress=lambda done, total: seen.append((done, total)))
    print(json.dumps({"folder": str(folder), "progress": seen}))
except ForetokenError as error:
    print(json.dumps({"error": error.message}))
"""


def fetch_in_child(model: str, home: Path, endpoint: str, **env: str) -> dict[str, Any]:
    """`resolve_model` in a process of its own, because the library reads its settings when it is imported."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING")) and "proxy" not in k.lower()}
    root = Path(__file__).resolve().parents[4]
    done = subprocess.run(
        [sys.executable, "-c", CHILD, model],
        env={**clean, "HF_HOME": str(home), "HF_ENDPOINT": endpoint, "PYTHONPATH": str(root), **env},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def test_fetches_what_is_served_once_and_serves_the_cache_when_the_hub_is_gone(tmp_path: Path) -> None:
    wanted = {
        "config.json": b"{}",
        "tokenizer.json": b"{ }",
        "chat_template.jinja": b"{{ messages }}",
        INDEX: index_of("model-1.safetensors", "model-2.safetensors"),
        "model-1.safetensors": b"1" * 300_000,
        "model-2.safetensors": b"2" * 200_000,
    }
    others = {
        "README.md": b"#",
        "consolidated.safetensors": b"3" * 500_000,
        "pytorch_model.bin": b"pickle",
        "modeling_evil.py": b"raise SystemExit",
        "original/weights.safetensors": b"4",
    }
    with serving(Hub(REPO, {**wanted, **others})) as hub:
        first = fetch_in_child(REPO, tmp_path, hub.url, HF_TOKEN="hf_secret")
        folder = Path(first["folder"])
        assert {file.name: file.read_bytes() for file in folder.iterdir()} == wanted
        assert sorted(hub.fetched) == sorted(wanted)
        assert "Bearer hf_secret" in hub.tokens
        num_bytes = sum(map(len, wanted.values())) - len(wanted[INDEX])  # the index came first
        assert first["progress"][-1] == [num_bytes, num_bytes]
        assert all(done <= total == num_bytes for done, total in first["progress"])
        again = fetch_in_child(REPO, tmp_path, hub.url)
        assert again["folder"] == first["folder"]
        assert sorted(hub.fetched) == sorted(wanted)
    offline = fetch_in_child(REPO, tmp_path, hub.url)
    assert offline["folder"] == first["folder"]
    (folder / "model-2.safetensors").unlink()
    assert "lacks model-2.safetensors: connect this machine" in fetch_in_child(REPO, tmp_path, hub.url)["error"]


def test_an_unreachable_hub_without_a_copy_says_what_was_tried(tmp_path: Path) -> None:
    with serving(Hub(REPO, {})) as hub:
        unused = hub.url
    error = fetch_in_child(REPO, tmp_path, unused)["error"]
    for part in (REPO, unused, "cannot be asked", str(tmp_path / "hub"), "no copy", "HF_ENDPOINT"):
        assert part in error
    assert "offline mode" in fetch_in_child(REPO, tmp_path, unused, HF_HUB_OFFLINE="1")["error"]


def test_a_model_that_the_hub_does_not_have(tmp_path: Path) -> None:
    with serving(Hub(REPO, {})) as hub:
        error = fetch_in_child("some-org/another", tmp_path, hub.url)["error"]
    assert error.startswith("the hub has no model some-org/another")
    assert "HF_TOKEN" in error


# ------------------------------------------------------------------------------- the library's functions, replaced


class FakeLibrary:
    """The functions of huggingface_hub that production calls, over a folder."""

    def __init__(self, folder: Path, files: Mapping[str, bytes | int]) -> None:
        """A file is its content, or the size that the hub says it has."""
        self.folder = folder
        self.sizes = {name: data if isinstance(data, int) else len(data) for name, data in files.items()}
        self.patterns: list[str] = []
        self.failure: Exception | None = None  # of the listing
        for name, data in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(data if isinstance(data, bytes) else b"")

    def model_info(self, _: object, repo_id: str, **options: Any) -> Any:
        if self.failure is not None:
            raise self.failure
        siblings = [SimpleNamespace(rfilename=name, size=size) for name, size in self.sizes.items()]
        return SimpleNamespace(sha=COMMIT, siblings=siblings)

    def hf_hub_download(self, repo_id: str, filename: str, **options: Any) -> str:
        return str(self.folder / filename)

    def snapshot_download(self, repo_id: str, **options: Any) -> str:
        self.patterns = options["allow_patterns"]
        return str(self.folder)


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[Mapping[str, bytes | int]], FakeLibrary]:
    def replace(files: Mapping[str, bytes | int]) -> FakeLibrary:
        fake = FakeLibrary(tmp_path / "snapshot", files)
        monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda self, *a, **k: fake.model_info(self, *a, **k))
        monkeypatch.setattr(huggingface_hub, "hf_hub_download", fake.hf_hub_download)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", fake.snapshot_download)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *a, **k: None)
        return fake

    return replace


def test_a_single_weight_file_and_a_revision(library: Callable[..., FakeLibrary]) -> None:
    fake = library({"config.json": b"{}", "model.safetensors": b"w", "other.safetensors": b"", "vocab.json": b"{}"})
    assert resolve_model(REPO, revision="v1.0") == fake.folder
    assert fake.patterns == ["config.json", "vocab.json", "model.safetensors"]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            {"config.json": b"{}", "pytorch_model.bin": b"x"},
            r"only pickled weights \(pytorch_model.bin\).*never opened",
        ),
        ({"config.json": b"{}", "consolidated.00.pth": b"x"}, "only pickled weights"),
        ({"config.json": b"{}"}, "has no safetensors weights"),
        (
            {"config.json": b"{}", "a.safetensors": b"", "b.safetensors": b""},
            "2 safetensors files .* but no model.safe",
        ),
        ({"model.safetensors": b""}, "has no config.json"),
        ({"config.json": b"{}", INDEX: index_of("m.safetensors")}, "incomplete: its .* names m.safetensors"),
        ({"config.json": b"{}", INDEX: index_of("../m.safetensors")}, "names '../m.safetensors'"),
        ({"config.json": b"{}", INDEX: index_of("m.bin")}, "names 'm.bin', which is no safetensors file"),
        ({"config.json": b"{}", INDEX: b"not json"}, "is no index of safetensors files"),
        ({"config.json": b"{}", INDEX: b"{}"}, "is no index of safetensors files"),
        ({"config.json": b"{}", INDEX: b'{"weight_map": []}'}, "is no index of safetensors files"),
    ],
)
def test_repositories_that_cannot_be_served(
    library: Callable[..., FakeLibrary], files: dict[str, bytes], message: str
) -> None:
    fake = library(files)
    with pytest.raises(CheckpointError, match=message):
        resolve_model(REPO)
    assert not fake.patterns, "nothing may be fetched"


def test_the_disk_is_checked_first(library: Callable[..., FakeLibrary], tmp_path: Path) -> None:
    fake = library({"config.json": b"{}", "model.safetensors": shutil.disk_usage(tmp_path).total + 1})
    with pytest.raises(CheckpointError, match=r"still needs .* GiB .* free: free some, or point HF_HOME"):
        resolve_model(REPO)
    assert not fake.patterns, "nothing may be fetched"


def test_what_is_cached_needs_no_room(
    library: Callable[..., FakeLibrary], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = library({"config.json": b"{}", "model.safetensors": shutil.disk_usage(tmp_path).total + 1})
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *a, **k: "/cached")
    assert resolve_model(REPO) == fake.folder


def http_error(kind: type[Exception]) -> Exception:
    error = kind.__new__(kind)
    error.args = ("401 Client Error",)
    return error


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("GatedRepoError", "is gated: accept its terms .* HF_TOKEN"),
        ("RepositoryNotFoundError", "the hub has no model .* check the spelling"),
        ("RevisionNotFoundError", "the hub has no some-org/a-model at revision 'v9': give a branch, a tag or a commit"),
    ],
)
@pytest.mark.parametrize("when", ["listing", "fetching"])
def test_the_hubs_refusals(
    library: Callable[..., FakeLibrary], monkeypatch: pytest.MonkeyPatch, kind: str, message: str, when: str
) -> None:
    fake = library({"config.json": b"{}", "model.safetensors": b"w"})
    error = http_error(getattr(huggingface_hub.errors, kind))

    def fail(*args: object, **options: object) -> str:
        raise error

    if when == "listing":
        fake.failure = error
    else:
        monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(CheckpointError, match=message):
        resolve_model(REPO, revision="v9")


def test_a_download_that_is_cut_short(library: Callable[..., FakeLibrary], monkeypatch: pytest.MonkeyPatch) -> None:
    library({"config.json": b"{}", "model.safetensors": b"w"})

    def fail(*args: object, **options: object) -> str:
        raise OSError("connection reset")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(
        CheckpointError, match=r"cut short: OSError: connection reset\. Try again: what has arrived is kept"
    ):
        resolve_model(REPO)


def test_serving_the_cache_is_said(library: Callable[..., FakeLibrary], caplog: pytest.LogCaptureFixture) -> None:
    fake = library({"config.json": b"{}", "model.safetensors": b"w"})
    fake.failure = TimeoutError("no answer")
    with caplog.at_level(logging.WARNING):
        assert resolve_model(REPO) == fake.folder
    assert "serving the cached copy of some-org/a-model" in caplog.text
