from __future__ import annotations

import os
import traceback
from pathlib import Path

import msgspec
import pytest
from pydantic import SecretStr, ValidationError

from cluster.config import FORMS, Settings, flag_name, load, store_address
from cluster.errors import ConfigError
from cluster.operate.controller import hung_after_s
from cluster.protocol import Launch
from cluster.silence import HUNG_LEASES, ORPHAN_PATIENCE, SUCCESSION_LEASES, SUCCESSION_S


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith("FORETOKEN_"):
            monkeypatch.delenv(name)


def _file(folder: Path, text: str) -> Path:
    path = folder / "serve.yaml"
    path.write_text(text)
    return path


def _origins(settings: Settings) -> dict[str, str]:
    return {setting.name: setting.origin for setting in settings.describe()}


def test_flag_beats_environment_beats_file_beats_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = _file(tmp_path, "port: 1\nhost: 0.0.0.0\nmax_num_seqs: 3\n")
    monkeypatch.setenv("FORETOKEN_PORT", "2")
    monkeypatch.setenv("FORETOKEN_MAX_NUM_SEQS", "4")
    settings = load({"port": 5, "token_budget": None}, path)
    assert (settings.port, settings.max_num_seqs, settings.host, settings.token_budget) == (5, 4, "0.0.0.0", 2048)
    origins = _origins(settings)
    assert origins["port"] == "--port"
    assert origins["max_num_seqs"] == "FORETOKEN_MAX_NUM_SEQS"
    assert origins["host"] == str(path)
    assert origins["token_budget"] == "default"


def test_describe_shows_each_setting_once_with_its_value() -> None:
    shown = {
        setting.name: setting.value for setting in load({"kv_cache_bytes": "2GiB", "prefix_cache": False}).describe()
    }
    assert list(shown) == list(Settings.model_fields)
    assert shown["kv_cache_bytes"] == "2.0GiB"
    assert shown["prefix_cache"] == "false"
    assert shown["max_model_len"] == "none"


def test_unknown_key_names_itself_and_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"unknown key 'max-num-seq'; did you mean 'max_num_seqs'\?") as caught:
        load(config=_file(tmp_path, "max-num-seq: 3\n"))
    assert caught.value.param == "max-num-seq"


@pytest.mark.parametrize(
    ("name", "value"),
    [("port", 70000), ("device", "gpu"), ("drain_timeout_s", float("nan")), ("log_level", "loud"), ("num_threads", 0)],
)
def test_bad_value_names_key_value_and_origin(name: str, value: object) -> None:
    with pytest.raises(ConfigError) as caught:
        load({name: value})
    assert caught.value.param == name
    assert repr(value) in caught.value.message
    assert f"from {flag_name(name)}" in caught.value.message


@pytest.mark.parametrize(
    ("name", "value", "form"),
    [
        ("store", "localhost:6379", "must begin with redis://"),
        ("cluster_name", "My_cluster", "must be letters a-z, digits and -"),
        ("device", "gpu", "must be auto, cpu, cuda or cuda:<i>"),
    ],
)
def test_a_value_of_another_form_is_told_the_form_in_words(name: str, value: str, form: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load({name: value})
    assert form in caught.value.message


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"orphan_timeout_s": 20},
        {"reroute_timeout_s": 27},
        {"lease_s": 4},
        {"lease_s": 0.3, "orphan_timeout_s": 86400, "reroute_timeout_s": 22.2},
        {"lease_s": 600, "orphan_timeout_s": 9000, "reroute_timeout_s": 4220},
        {"lease_s": 600, "orphan_timeout_s": 86400, "reroute_timeout_s": 86400},
    ],
)
def test_a_hung_controller_is_replaced_before_workers_end_and_requests_give_up(given: dict[str, float]) -> None:
    settings = load(given)
    hung_s = hung_after_s(settings)
    assert hung_s >= HUNG_LEASES * settings.lease_s
    assert hung_s <= settings.orphan_timeout_s / ORPHAN_PATIENCE
    assert hung_s + SUCCESSION_S + SUCCESSION_LEASES * settings.lease_s <= settings.reroute_timeout_s


@pytest.mark.parametrize(
    ("name", "given", "least_s"),
    [
        ("orphan_timeout_s", {"orphan_timeout_s": 19.9}, 20),
        ("orphan_timeout_s", {"lease_s": 0.3, "orphan_timeout_s": 4.5}, 20),
        ("orphan_timeout_s", {"lease_s": 4.1}, 61.5),
        ("orphan_timeout_s", {"lease_s": 600, "orphan_timeout_s": 8999, "reroute_timeout_s": 4220}, 9000),
        ("reroute_timeout_s", {"reroute_timeout_s": 26.9}, 27),
        ("reroute_timeout_s", {"lease_s": 6, "orphan_timeout_s": 90}, 62),
        ("reroute_timeout_s", {"lease_s": 600, "orphan_timeout_s": 9000, "reroute_timeout_s": 4219}, 4220),
    ],
)
def test_times_that_leave_no_room_for_the_next_controller_are_refused(
    name: str, given: dict[str, float], least_s: float
) -> None:
    with pytest.raises(ConfigError) as caught:
        load(given)
    values = {"orphan_timeout_s": 60.0, "reroute_timeout_s": 60.0, "lease_s": 1.0} | given
    assert caught.value.message.startswith(
        f"{name} = {values[name]:g} must be at least {least_s:g} where lease_s = {values['lease_s']:g}: "
    )
    origins = {name: flag_name(name) if name in given else "default" for name in values}
    assert f"is from {origins[name]}, lease_s from {origins['lease_s']})" in caught.value.message
    assert caught.value.param == name
    assert getattr(load(given | {name: least_s}), name) == least_s


def test_every_pattern_has_words() -> None:
    fields = Settings.model_fields.items()
    assert set(FORMS) == {name for name, field in fields if any(getattr(m, "pattern", None) for m in field.metadata)}


def test_a_flag_is_the_settings_name_without_its_unit() -> None:
    assert flag_name("max_num_seqs") == "--max-num-seqs"
    assert flag_name("drain_timeout_s") == "--drain-timeout"


SECRET = "s3cret"
WITH_PASSWORD = [
    f"redis://:{SECRET}@h:1/0",
    f"rediss://user:{SECRET}@h/0",
    f"unix://:{SECRET}@/run/redis.sock?db=1",
    f"redis://h/0?password={SECRET}",
    f"redis://h/0?Pass%77ord={SECRET}",
    f"redis://:a@{SECRET}@h:1/0",
]
UNREADABLE = [
    f"http://:{SECRET}@h",
    f"redis://:{SECRET}/x@h",
    f"redis://:1/{SECRET}@h",
    f"redis://u:a?{SECRET}@h",
    f"redis://u:a#{SECRET}@h",
    f"redis://h:{SECRET}",
    f"redis://[{SECRET}",
    SECRET,
]


@pytest.mark.parametrize("url", WITH_PASSWORD)
def test_a_stores_password_is_shown_nowhere(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORETOKEN_STORE", url)
    settings = load()
    assert settings.store is not None
    assert settings.store.get_secret_value() == url
    shown = {setting.name: setting.value for setting in settings.describe()}
    assert SECRET not in f"{settings!r}{settings}{settings.model_dump()}{settings.model_dump_json()}{shown}"
    assert shown["store"] == store_address(settings.store)


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("redis://u:p@h:1/0", "redis://h:1/0"),
        ("rediss://u@[::1]:7/0?socket_timeout=1", "rediss://[::1]:7/0"),
        ("unix://:p%40@/run/r.sock?db=2", "unix:///run/r.sock"),
        ("redis://h", "redis://h"),
    ],
)
def test_where_a_store_is_may_be_shown(url: str, address: str) -> None:
    assert store_address(SecretStr(url)) == address


@pytest.mark.parametrize("url", WITH_PASSWORD)
def test_a_store_with_a_password_is_no_flag(url: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="set FORETOKEN_STORE instead, or `store` in the config file") as caught:
        load({"store": url})
    assert SECRET not in caught.value.message
    assert load(config=_file(tmp_path, f"store: '{url}'\n")).store == SecretStr(url)


@pytest.mark.parametrize("url", ["redis://h:1/0", "redis://user@h", "unix:///run/redis.sock?db=1"])
def test_a_store_without_one_is(url: str) -> None:
    assert load({"store": url}).store == SecretStr(url)


@pytest.mark.parametrize("url", UNREADABLE)
@pytest.mark.parametrize("is_flag", [True, False])
def test_no_error_shows_a_secret(url: str, is_flag: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not is_flag:
        monkeypatch.setenv("FORETOKEN_STORE", url)
    with pytest.raises(
        ConfigError, match=r"store \(from (FORETOKEN_STORE|--store)\): must begin with redis://"
    ) as caught:
        load({"store": url} if is_flag else {})
    assert SECRET not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize(
    "text",
    [
        f"store: [{SECRET}\n",
        f"token: *{SECRET}\n",
        f"token: !{SECRET} x\n",
        f'store: "redis://:{SECRET}@h\n',
        f"token: @{SECRET}\n",
        f"token: [{SECRET}]\n",
        f"- {SECRET}\n",
        f"redis://:{SECRET}@h\n",
        f"toke: {SECRET}\n",
        f"{{token: {SECRET}: x}}\n",
    ],
)
def test_no_error_of_a_file_quotes_a_secret(text: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"serve\.yaml|token") as caught:
        load(config=_file(tmp_path, text))
    assert SECRET not in "".join(traceback.format_exception(caught.value))


def test_a_file_that_is_not_yaml_says_where(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"serve\.yaml is not YAML: line 2, column 9 cannot be read"):
        load(config=_file(tmp_path, "port: 1\nhost: [a}\n"))


def test_bad_value_in_the_environment_names_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORETOKEN_TOKEN_BUDGET", "many")
    with pytest.raises(ConfigError, match=r"token_budget = 'many' \(from FORETOKEN_TOKEN_BUDGET\)"):
        load()


@pytest.mark.parametrize("text", ["- a list\n", "port: [\n", "\x00"])
def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match=r"serve\.yaml"):
        load(config=_file(tmp_path, text))


def test_a_missing_file_is_an_error_and_an_empty_one_is_not(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load(config=tmp_path / "none.yaml")
    assert load(config=_file(tmp_path, "# nothing\n")) == load()


def test_yaml_tags_build_no_objects(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not YAML"):
        load(config=_file(tmp_path, "host: !!python/object/apply:os.getcwd []\n"))


def test_settings_are_frozen_and_the_home_is_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORETOKEN_HOME", "~/here")
    settings = load()
    assert settings.home == Path.home() / "here"
    with pytest.raises(ValidationError, match="frozen"):
        settings.port = 1  # type: ignore[misc]


def test_the_shipped_file_is_valid_and_says_the_defaults() -> None:
    path = Path(__file__).resolve().parents[3] / "configs" / "serve.yaml"
    settings = load(config=path)
    assert settings.model_dump() == load().model_dump()
    assert set(_origins(settings).values()) == {str(path), "default"}


def test_defaults_agree_with_the_launch_message() -> None:
    launch = {field.name: field.default for field in msgspec.structs.fields(Launch)}
    shared = set(launch) & set(Settings.model_fields)
    shared -= {"orphan_timeout_s"}  # a worker of `serve` has no controller that it could lose
    assert len(shared) >= 10
    assert {name: Settings.model_fields[name].default for name in shared} == {name: launch[name] for name in shared}
