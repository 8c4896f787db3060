"""The environment of every process that we start: made here, so that no secret is inherited. What a process needs of
ours, it is given.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

from cluster.config import ENV_PREFIX

PACKAGES = Path(__file__).resolve().parents[1]  # the folder that holds cluster/ and workers/
RAY_PREFIX = "RAY_"
MARK = "FORETOKEN_RUN_ID"  # in every process that comes of one supervisor, by which leftovers are found
# Other programs' secrets, which a process of ours has no use for: by their name, or a password within an address.
SECRET_NAME = re.compile(
    r"(?:^|_)(?:KEYS?|AUTH|CREDENTIALS?|PASS|PAT|JWT)(?:_|$)|TOKENS?(?:_|$)|_PWD(?:_|$)|PASS(?:W(?:OR)?D|PHRASE|FILE)"
    r"|SECRET|APIKEY|CONNECTION_STRING|COOKIE|WEBHOOK",
    re.IGNORECASE,
)
SECRET_VALUE = re.compile(r"://[^/?#@\s]*:[^@\s]+@")


def python_path(inherited: Mapping[str, str]) -> str:
    """The ``PYTHONPATH`` of a process of ours: our packages first, then what is inherited."""
    return os.pathsep.join([str(PACKAGES), *filter(None, [inherited.get("PYTHONPATH")])])


def ray_variables(inherited: Mapping[str, str]) -> dict[str, str]:
    """What a process needs that talks to Ray: where it is, its token, and how it is tuned."""
    return {name: value for name, value in inherited.items() if name.startswith(RAY_PREFIX)}


def child_environment(inherited: Mapping[str, str], given: Mapping[str, str] | None = None) -> dict[str, str]:
    """What a process of ours runs with: of `inherited` neither our settings nor Ray's, nor anybody's secrets; `given`.

    The mark of the supervisor is inherited.
    """
    kept = {name: value for name, value in inherited.items() if name == MARK or not _is_private(name, value)}
    return kept | {"PYTHONPATH": python_path(inherited)} | dict(given or {})


def _is_private(name: str, value: str) -> bool:
    return (
        name.startswith((ENV_PREFIX, RAY_PREFIX))
        or SECRET_NAME.search(name) is not None
        or SECRET_VALUE.search(value) is not None
    )
