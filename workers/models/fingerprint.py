"""What tells one checkpoint from another without reading all of it.

Covered: config.json and generation_config.json (but who wrote them, and from where), tokenizer.json, and of the weights
every tensor's name, dtype and shape, and some bytes from the middle of tensors of each kind: those whose names differ
in their numbers only are one kind, and of a kind all are looked at, or as many as `SAMPLES`, evenly spread. Two folders
with the same content have the same fingerprint however the tensors lie in files, wherever and since when.

It is no proof against somebody who wants to deceive. A revision, a finetune, a merged adapter or another rounding
changes all elements of all tensors of some kind; what changes few elements of few tensors may pass unseen.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cluster.errors import CheckpointError
from workers.models.checkpoint import TensorEntry, read_config, read_entries, read_json

SAMPLES = 64  # tensors of a kind
SAMPLE_BYTES = 512  # of each: a page is read from the disk for it in any case
UNIMPORTANT = ("_name_or_path", "transformers_version", "_commit_hash")
DIGEST_BYTES = 16


def fingerprint(path: Path) -> str:
    """Of the checkpoint in folder `path`, in hexadecimal. Some hundred short reads, whatever its size.

    Raises `CheckpointError` for a file that cannot be read.
    """
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
    digest.update(_canonical(read_config(path)))
    generation = path / "generation_config.json"
    digest.update(_canonical(read_json(generation)) if generation.exists() else b"none")
    entries = read_entries(path)
    described = sorted((name, entry.dtype, entry.shape) for name, entry in entries.items())
    digest.update(repr(described).encode())
    try:
        digest.update(hashlib.blake2b((path / "tokenizer.json").read_bytes()).digest())
        for sample in _samples(entries):
            digest.update(sample)
    except OSError as error:
        raise CheckpointError(f"{error.filename or path} cannot be read: {error.strerror}") from error
    return digest.hexdigest()


def _canonical(config: Mapping[str, Any]) -> bytes:
    kept = {name: value for name, value in config.items() if name not in UNIMPORTANT}
    return json.dumps(kept, sort_keys=True).encode()


def _samples(entries: Mapping[str, TensorEntry]) -> Iterator[bytes]:
    """Bytes from the middle of some tensors, in the order of their names."""
    kinds: dict[str, list[str]] = {}
    for name in sorted(entries):
        kinds.setdefault(re.sub(r"\d+", "#", name), []).append(name)
    with contextlib.ExitStack() as stack:
        opened: dict[Path, int] = {}
        for names in kinds.values():
            num = min(len(names), SAMPLES)
            for place in range(num):
                entry = entries[names[place * len(names) // num]]
                if entry.file not in opened:
                    opened[entry.file] = os.open(entry.file, os.O_RDONLY)
                    stack.callback(os.close, opened[entry.file])
                length = min(SAMPLE_BYTES, entry.num_bytes)
                yield os.pread(opened[entry.file], length, entry.offset + (entry.num_bytes - length) // 2)
