"""A disk that takes nothing: for who writes files whole (`cluster.files.write_whole`)."""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
from collections.abc import Iterator
from typing import NoReturn

import pytest


@contextlib.contextmanager
def full_disk() -> Iterator[None]:
    def mkstemp(*_: object, **__: object) -> NoReturn:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "mkstemp", mkstemp)
        yield
