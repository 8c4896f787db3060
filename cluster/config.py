"""Every setting of the server, as one frozen value.

A setting has one name in four places, and the first that gives it a value wins:

1. a flag, ``--max-num-seqs 32`` (all but ``data``, ``token`` and ``admin_api_key`` have one)
2. the environment, ``FORETOKEN_MAX_NUM_SEQS=32``
3. the file of ``--config`` (or ``FORETOKEN_CONFIG``), YAML: ``max_num_seqs: 32``
4. the default of its field here, which the command line shows as well

`load` reads them; `Settings.describe` tells each value and where it came from. A name that ends in ``_s`` is a time in
seconds (its flag goes without: ``--drain-timeout``). A size is a number of bytes or text such as ``4GiB``.
What a secret says stands in no error. A store with a password is no flag: everybody sees the list of processes.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args
from urllib.parse import parse_qsl, urlsplit

import pydantic
import yaml
from pydantic import BeforeValidator, ByteSize, Field, PrivateAttr, SecretStr, field_validator, model_validator
from pydantic_core import PydanticCustomError
from pydantic_settings import BaseSettings, EnvSettingsSource, SettingsConfigDict

from cluster.errors import ConfigError
from cluster.silence import least_orphan_s, least_reroute_s

ENV_PREFIX = "FORETOKEN_"
FORMS = {  # what the pattern of a field asks for
    "device": "must be auto, cpu, cuda or cuda:<i>",
    "otlp_traces_endpoint": "must be a URL that begins with http:// or https://, without a user or password",
    "cluster_name": "must be letters a-z, digits and -, at most 40 in all, with no - at either end",
}
STORE_FORM = (
    "must begin with redis://, rediss:// or unix://, such as redis://localhost:6379/0; special characters of user and "
    "password are percent-encoded: / as %2F, @ as %40"
)
CONTRADICTION = "contradiction"  # pydantic's type of an error of two settings, each of which is fine by itself
# What follows the scheme: nothing else has an @, or a part of the password would be taken for the host.
STORE_PATTERN = re.compile(r"(redis|rediss|unix)://([^/?#]*@)?[^/?#@]*(/[^?#@]*)?(\?[^#@]*)?(#[^@]*)?")


def _expand_user(value: Any) -> Any:
    return Path(value).expanduser() if isinstance(value, str | Path) else value


Folder = Annotated[Path, BeforeValidator(_expand_user)]


@dataclass(frozen=True)
class Setting:
    """One line of `Settings.describe`."""

    name: str
    value: str
    origin: str  # "default", "FORETOKEN_…", "--flag" or the file's path
    help: str


class Settings(BaseSettings):
    """What `foretoken serve` and its sisters run with. Made by `load`, never written afterwards."""

    model_config = SettingsConfigDict(
        frozen=True,
        extra="forbid",
        env_prefix=ENV_PREFIX,
        env_ignore_empty=True,
        protected_namespaces=(),
        hide_input_in_errors=True,
    )

    # what is served
    model: str | None = Field(None, description="a Hugging Face id or a local folder; none: the demo model")
    revision: str | None = Field(None, description="branch, tag or commit of a Hugging Face id")
    served_model_name: str | None = Field(None, description="the name clients use; none: the id or the folder's name")
    home: Folder = Field(Path("~/.cache/foretoken").expanduser(), description="where prepared files are kept")
    data: Folder = Field(Path("../shared/data"), description="folder of public traces and task sets, for benches")

    # the front door
    host: str = Field("127.0.0.1", description="address to listen on")
    port: int = Field(8000, ge=0, le=65535, description="port to listen on; 0: any free one")
    drain_timeout_s: float = Field(10.0, ge=0, allow_inf_nan=False, description="what runs may finish for this long")
    start_timeout_s: float = Field(600.0, gt=0, allow_inf_nan=False, description="a worker may load for this long")
    request_timeout_s: float = Field(600.0, gt=0, allow_inf_nan=False, description="a request may take this long")
    tool_parser: Literal["auto", "hermes", "mistral", "none"] = Field(
        "auto", description="how the model writes calls of tools; auto: by its chat template and tokens"
    )
    reasoning_parser: Literal["auto", "think", "none"] = Field(
        "auto", description="how the model marks its thoughts; auto: by its chat template and tokens"
    )
    max_open_requests: int = Field(1024, ge=1, description="requests at once; one more is told to come back later")
    max_open_requests_per_tenant: int = Field(
        0, ge=0, description="requests at once of one tenant; 0: as many as of all"
    )
    max_ttft_s: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="a request whose first token is predicted to come later is told to come back; none: no bound",
    )
    max_connections: int = Field(4096, ge=1, le=1 << 20, description="connections at once, with requests or without")
    api_key: SecretStr | None = Field(
        None,
        description="keys that clients must send, as KEY or TENANT:KEY, with commas between; none: none is needed on a "
        "loopback address, and one is made and printed for any other. A flag is seen by everybody on this machine, in "
        "the list of processes: FORETOKEN_API_KEY and --api-key-file are not",
    )
    api_key_file: Annotated[Path, BeforeValidator(_expand_user)] | None = Field(
        None, description="a file of keys that only you can read: KEY or TENANT:KEY on each line"
    )
    admin_api_key: SecretStr | None = Field(None, description="the key of the routes under /admin (no flag)")
    share_prefix_cache: bool = Field(False, description="tenants find each other's prompts in the prefix cache")

    # the engine
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="auto, cpu, cuda or cuda:<i>")
    numerics: Literal["auto", "invariant", "fast"] = Field(
        "auto", description="invariant: a token does not depend on its batch; fast; auto: invariant on a CPU"
    )
    max_model_len: int | None = Field(None, ge=1, description="tokens of prompt and output; none: the checkpoint's")
    max_num_seqs: int = Field(64, ge=1, le=4096, description="sequences that run at once")
    token_budget: int = Field(2048, ge=1, le=1 << 20, description="tokens computed in one step")
    page_size: int = Field(64, ge=1, le=1024, description="positions in a page of the KV cache")
    kv_cache_bytes: ByteSize | None = Field(None, gt=0, description="size of the KV cache; none: sized to the machine")
    prefix_cache: bool = Field(True, description="keep the pages of finished prompts for later ones")
    static_batching: bool = Field(False, description="wait for whole batches (a baseline for benches)")
    host_kernels: bool = Field(True, description="compile and use the CPU kernels; otherwise torch's own operations")
    num_threads: int | None = Field(None, ge=1, le=4096, description="CPU threads of the engine; none: all cores")

    # the cluster
    cluster_name: str = Field(
        "foretoken", pattern=r"^[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?$", description="one of several on the same machines"
    )
    local: int | None = Field(
        None, ge=1, le=16, description="start so many Ray nodes on this machine; none: join the Ray that runs"
    )
    attention_workers: int = Field(2, ge=1, le=256, description="workers that run requests")
    expert_workers: int = Field(2, ge=1, le=256, description="workers that hold experts, at most")
    expert_copies: int = Field(1, ge=1, le=8, description="copies of an expert at most, each on a node of its own")
    store: SecretStr | None = Field(
        None,
        description="the cluster's Redis; none: `cluster up` starts one; with a password: FORETOKEN_STORE or the file",
    )
    token: SecretStr | None = Field(None, description="what processes of a cluster show each other (no flag)")
    advertise: str | None = Field(None, description="address that others reach this process at; none: found")
    lease_s: float = Field(1.0, ge=0.3, le=600, description="a worker that is silent for this long is lost")
    peer_timeout_s: float = Field(2.0, gt=0, le=600, description="a worker waits this long for another's answer")
    reroute_timeout_s: float = Field(
        60.0, gt=0, le=86400, description="requests wait this long for lost experts (at least 20, and 7 leases more)"
    )
    orphan_timeout_s: float = Field(
        60.0, gt=0, le=86400, description="a worker without a controller ends after this (at least 20, and 15 leases)"
    )

    # what it says
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="what is logged")
    log_format: Literal["text", "json"] = Field("text", description="lines for people, or one JSON object a line")
    vllm_metrics: bool = Field(False, description="metrics that vLLM has too are there under its names as well")
    otlp_traces_endpoint: str | None = Field(
        None,
        pattern=r"^https?://[^\s@]+$",
        description="URL that traces go to by OTLP over HTTP, such as http://localhost:4318/v1/traces; none: as "
        "OTEL_EXPORTER_OTLP_ENDPOINT says, or nowhere",
    )

    _origins: Mapping[str, str] = PrivateAttr(default_factory=dict)

    @field_validator("store")
    @classmethod
    def _check_store(cls, url: SecretStr | None) -> SecretStr | None:
        if url is not None and not _is_store_url(url.get_secret_value()):
            raise PydanticCustomError("store_url", "{form}", {"form": STORE_FORM})
        return url

    @model_validator(mode="after")
    def _check_times(self) -> Self:
        for name, least_s, before in (
            ("orphan_timeout_s", least_orphan_s(self.lease_s), "workers end themselves"),
            ("reroute_timeout_s", least_reroute_s(self.lease_s), "requests give up on experts that it has loaded"),
        ):
            if getattr(self, name) < least_s:
                raise PydanticCustomError(
                    CONTRADICTION,
                    "{name} = {value} must be at least {least} where {other} = {other_value}: a controller that hangs "
                    "must be noticed, and the next one there, before {before}",
                    {
                        "name": name,
                        "value": f"{getattr(self, name):g}",
                        "least": f"{least_s:g}",
                        "other": "lease_s",
                        "other_value": f"{self.lease_s:g}",
                        "before": before,
                    },
                )
        return self

    def describe(self) -> list[Setting]:
        """Every setting with its value and where that came from, in the order of the fields."""
        return [
            Setting(name, _show(name, getattr(self, name)), self._origins.get(name, "default"), field.description or "")
            for name, field in type(self).model_fields.items()
        ]


SECRETS = frozenset(name for name, field in Settings.model_fields.items() if SecretStr in get_args(field.annotation))


def store_address(url: SecretStr) -> str:
    """Where a store is, as it may be shown: without user, password and options."""
    parts = urlsplit(url.get_secret_value())
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def _is_store_url(url: str) -> bool:
    try:
        _ = urlsplit(url).port
    except ValueError:
        return False
    return STORE_PATTERN.fullmatch(url) is not None


def _has_password(url: SecretStr) -> bool:
    parts = urlsplit(url.get_secret_value())
    options = parse_qsl(parts.query, keep_blank_values=True)
    return bool(parts.password) or any("password" in name.lower() for name, _ in options)


def _show(name: str, value: Any) -> str:
    if name == "store" and value is not None:
        return store_address(value)
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    return value.human_readable() if isinstance(value, ByteSize) else str(value)


def flag_name(setting: str) -> str:
    """The flag of a setting: ``max_num_seqs`` -> ``--max-num-seqs``, ``drain_timeout_s`` -> ``--drain-timeout``."""
    return "--" + setting.removesuffix("_s").replace("_", "-")


def load(flags: Mapping[str, Any] | None = None, config: Path | None = None) -> Settings:
    """Settings from flags (None: not given), the environment and a file.

    Raises `ConfigError` for a file that cannot be read, a key it does not know, or a value out of range: it names the
    key, the value unless it is a secret, and where they stand.
    """
    from_file = {} if config is None else _read_file(config)
    from_env = dict(EnvSettingsSource(Settings)())
    from_flags = {name: value for name, value in (flags or {}).items() if value is not None}
    origins = dict.fromkeys(from_file, str(config))
    origins |= {name: ENV_PREFIX + name.upper() for name in from_env}
    origins |= {name: flag_name(name) for name in from_flags}
    try:
        settings = Settings(**(from_file | from_env | from_flags))
    except pydantic.ValidationError as error:
        raise _config_error(error, origins) from None
    if "store" in from_flags and settings.store is not None and _has_password(settings.store):
        raise ConfigError(
            f"--store {store_address(settings.store)} was given with a password, which everybody on this machine sees "
            "in the list of processes: set FORETOKEN_STORE instead, or `store` in the config file, and change it",
            param="store",
        )
    settings._origins = origins
    return settings


def _read_file(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"the config file {path} cannot be read: {error.strerror}", param="config") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        # its own text may quote the line, and so a secret
        where = getattr(error, "problem_mark", None)
        place = f"line {where.line + 1}, column {where.column + 1} cannot be read" if where is not None else "no text"
        raise ConfigError(f"the config file {path} is not YAML: {place}", param="config") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"the config file {path} must hold `key: value` lines", param="config")
    for key in content:
        if key not in Settings.model_fields:
            nearest = difflib.get_close_matches(str(key).replace("-", "_"), Settings.model_fields, n=1, cutoff=0.5)
            hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
            known = ", ".join(Settings.model_fields)
            raise ConfigError(
                f"the config file {path} has an unknown key {key!r}{hint}; known are {known}", param=str(key)
            )
    return content


def _config_error(error: pydantic.ValidationError, origins: Mapping[str, str]) -> ConfigError:
    first = error.errors(include_url=False)[0]
    if first["type"] == CONTRADICTION:
        name, other = first["ctx"]["name"], first["ctx"]["other"]
        from_where = f"{name} is from {origins.get(name, 'default')}, {other} from {origins.get(other, 'default')}"
        return ConfigError(f"{first['msg']} ({from_where})", param=name)
    name = str(first["loc"][0])
    origin = origins.get(name, "default")
    reason = FORMS[name] if first["type"] == "string_pattern_mismatch" else first["msg"]
    what = name if name in SECRETS else f"{name} = {first['input']!r}"
    return ConfigError(f"{what} (from {origin}): {reason}", param=name)
