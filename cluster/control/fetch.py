"""From what the user calls a model to a folder on this machine: a local folder, or a Hugging Face hub id.

The hub's own library fetches and keeps the cache (`HF_TOKEN`, `HF_HOME`, `HF_ENDPOINT` and `HF_HUB_OFFLINE` are its
settings). Only what is served is fetched: safetensors weights, configs, tokenizer files, the chat template.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from cluster.errors import CheckpointError, ConfigError

log = logging.getLogger(__name__)

Progress = Callable[[int, int], None]  # bytes fetched so far, and in all

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SMALL_FILES = frozenset(
    {
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.json",
        "merges.txt",
        "chat_template.jinja",
        "chat_template.json",
        INDEX,
    }
)
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
LISTING_TIMEOUT_S = 20.0
SPARE_BYTES = 64 << 20  # left free on the disk

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.\-]*(/[A-Za-z0-9][\w.\-]*)?")


def resolve_model(model: str, *, revision: str | None = None, progress: Progress | None = None) -> Path:
    """The folder of `model`: itself where it is one, otherwise the hub cache's, fetched first where needed.

    Without `progress` the library draws its own bars on a terminal. Raises `CheckpointError` for what is not there,
    cannot be reached, does not fit or has only pickled weights, and `ConfigError` for a revision of a local folder.
    """
    path = Path(model).expanduser()
    if model and path.is_dir():
        if revision is not None:
            raise ConfigError(
                f"revision {revision!r} says nothing about the local folder {path}: leave it out, or give a hub id",
                param="revision",
            )
        return path
    if model and path.exists():
        raise _fault(f"model {model!r} is a file: give the folder that holds config.json and the safetensors files")
    if not _HUB_ID.fullmatch(model) or ".." in model or "--" in model:
        raise _fault(f"model {model!r} is neither a folder on this machine nor a hub id such as Qwen/Qwen3-30B-A3B")
    return _from_hub(model, revision, progress)


def _fault(message: str) -> CheckpointError:
    return CheckpointError(message, param="model")


def _from_hub(repo_id: str, revision: str | None, progress: Progress | None) -> Path:
    import huggingface_hub  # takes half a second, which a local folder should not wait for

    name = repo_id if revision is None else f"{repo_id} at revision {revision!r}"
    try:
        info = huggingface_hub.HfApi().model_info(
            repo_id, revision=revision, files_metadata=True, timeout=LISTING_TIMEOUT_S
        )
    except Exception as error:  # beside its own, the library lets through its HTTP client's, which differ by version
        if (fault := _refusal(name, error)) is not None:
            raise fault from error
        return _from_cache(name, repo_id, revision, error)
    sizes = {item.rfilename: item.size or 0 for item in info.siblings or ()}
    try:
        files = _choose(name, sizes, lambda: _fetch_index(repo_id, revision))
        missing = [file for file in files if not _is_cached(repo_id, file, info.sha)]
        num_bytes = sum(sizes[file] for file in missing)
        _check_disk(name, num_bytes)
        log.info("fetching %s: %d of %d files, %.2f GiB", name, len(missing), len(files), num_bytes / 2**30)
        folder = huggingface_hub.snapshot_download(
            repo_id,
            revision=revision,
            allow_patterns=[_literal(file) for file in files],
            tqdm_class=_counting_bars(progress, num_bytes) if progress is not None else None,
        )
    except CheckpointError:
        raise
    except Exception as error:
        fault = _refusal(name, error)
        raise fault or _fault(
            f"fetching {name} was cut short: {_text(error)}. Try again: what has arrived is kept"
        ) from error
    if progress is not None:
        progress(num_bytes, num_bytes)
    return _whole(name, Path(folder))


def _text(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no details'}"


def _refusal(name: str, error: Exception) -> CheckpointError | None:
    """What to tell the user where the hub answered that there is no such model for this machine; otherwise None."""
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return _fault(
            f"{name} is gated: accept its terms on its page on the hub, then set HF_TOKEN to a token of that account"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return _fault(f"the hub has no {name}: give a branch, a tag or a commit that it has")
    if isinstance(error, errors.RepositoryNotFoundError):
        return _fault(
            f"the hub has no model {name} that this machine may see: check the spelling; for a private one set HF_TOKEN"
        )
    return None


def _from_cache(name: str, repo_id: str, revision: str | None, cause: Exception) -> Path:
    """The cached copy of a model where the hub cannot be asked, because of `cause`."""
    import huggingface_hub
    from huggingface_hub import constants

    try:
        # Asked for one file, the library does not mind what was never fetched; `_whole` looks at the rest.
        folder = huggingface_hub.snapshot_download(
            repo_id, revision=revision, allow_patterns=["config.json"], local_files_only=True
        )
    except Exception as error:
        raise _fault(
            f"{name} is no folder here, the hub at {constants.ENDPOINT} cannot be asked ({_text(cause)}), and its "
            f"cache {constants.HF_HUB_CACHE} has no copy. Connect this machine (HF_ENDPOINT names a mirror), or fetch "
            "the model on another and give the folder"
        ) from error
    whole = _whole(name, Path(folder))
    log.warning("the hub cannot be asked (%s): serving the cached copy of %s", _text(cause), name)
    return whole


def _fetch_index(repo_id: str, revision: str | None) -> Path:
    import huggingface_hub

    return Path(huggingface_hub.hf_hub_download(repo_id, INDEX, revision=revision))


def _choose(name: str, sizes: Mapping[str, int], fetch_index: Callable[[], Path]) -> list[str]:
    """Which of a repository's files to fetch. Raises `CheckpointError` where it holds nothing that can be served."""
    if "config.json" not in sizes:
        raise _fault(f"{name} has no config.json: it is not a checkpoint in Hugging Face layout")
    small = sorted(SMALL_FILES & sizes.keys())
    at_root = sorted(file for file in sizes if file.endswith(".safetensors") and "/" not in file)
    if INDEX in sizes:  # a repository may hold the weights in a second layout beside the index's
        weights = _indexed(fetch_index())
        lacking = sorted(set(weights) - sizes.keys())
        if lacking:
            raise _fault(f"{name} is incomplete: its {INDEX} names {lacking[0]}, which it does not have")
    elif SINGLE in sizes:
        weights = [SINGLE]
    elif len(at_root) == 1:
        weights = at_root
    elif at_root:
        raise _fault(f"{name} has {len(at_root)} safetensors files ({at_root[0]}, …) but no {INDEX}")
    else:
        pickles = sorted(file for file in sizes if Path(file).suffix in PICKLES)
        if pickles:
            raise _fault(
                f"{name} has only pickled weights ({pickles[0]}), which are never opened, because a pickle can run any "
                "code: look for a revision with safetensors files (--revision), such as refs/pr/<n> of the hub's bot"
            )
        raise _fault(f"{name} has no safetensors weights")
    return small + weights


def _indexed(index: Path) -> list[str]:
    """The weight files that an index names. Raises `CheckpointError` for one that is no index."""
    try:
        weight_map: Any = json.loads(index.read_bytes())["weight_map"]
        names = sorted({str(file) for file in weight_map.values()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _fault(f"{index} is no index of safetensors files ({_text(error)})") from error
    for name in names:
        if not name.endswith(".safetensors") or "/" in name or "\\" in name:
            raise _fault(f"{index} names {name!r}, which is no safetensors file beside it")
    return names


def _literal(name: str) -> str:
    """A pattern that matches this name alone."""
    return re.sub(r"([*?\[])", r"[\1]", name)


def _is_cached(repo_id: str, file: str, commit: str | None) -> bool:
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(repo_id, file, revision=commit), str)


def _check_disk(name: str, num_bytes: int) -> None:
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE)
    present = next(folder for folder in (cache, *cache.absolute().parents) if folder.exists())
    free = shutil.disk_usage(present).free
    if num_bytes and num_bytes + SPARE_BYTES > free:
        raise _fault(
            f"{name} still needs {num_bytes / 2**30:.2f} GiB and {cache} has {free / 2**30:.2f} GiB free: free some, "
            "or point HF_HOME to a larger disk"
        )


def _whole(name: str, folder: Path) -> Path:
    """`folder`, once config and weights are all there. A cache may hold what an interrupted download left."""
    wanted: Iterable[str] = ["config.json"]
    if (folder / INDEX).exists():
        wanted = [*wanted, *_indexed(folder / INDEX)]
    elif not any(folder.glob("*.safetensors")):
        wanted = [*wanted, SINGLE]
    for file in wanted:
        if not (folder / file).exists():
            raise _fault(f"the cached copy of {name} in {folder} lacks {file}: connect this machine and try again")
    return folder


def _counting_bars(progress: Progress, num_bytes: int) -> type[Any]:
    """A progress bar class for the library that draws nothing and tells `progress` the bytes."""
    from huggingface_hub.utils.tqdm import tqdm

    class CountingBar(tqdm):
        def __init__(self, *args: Any, **options: Any) -> None:
            # There is a bar for bytes written, one for bytes on the wire (".transfer"), and one for files.
            name = str(options.get("name") or "")
            self.counts = options.get("unit") == "B" and not name.endswith(".transfer")
            self.done = 0
            super().__init__(*args, **{**options, "disable": True})

        def update(self, n: float | None = 1) -> bool | None:
            if self.counts:
                self.done += int(n or 0)
                progress(min(self.done, num_bytes), num_bytes)
            return super().update(n)

    return CountingBar
