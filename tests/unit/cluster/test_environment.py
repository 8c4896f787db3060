from __future__ import annotations

import os
from pathlib import Path

import pytest

from cluster.environment import MARK, PACKAGES, child_environment, python_path, ray_variables


def test_a_child_inherits_neither_our_settings_nor_rays() -> None:
    inherited = {
        "FORETOKEN_STORE": "redis://h",
        "FORETOKEN_PORT": "1",
        "RAY_ADDRESS": "a:1",
        "HOME": "/h",
        "PATH": "/b",
    }
    assert child_environment(inherited) == {"HOME": "/h", "PATH": "/b", "PYTHONPATH": str(PACKAGES)}


def test_it_has_what_it_is_given_and_its_supervisors_mark() -> None:
    inherited = {MARK: "of the supervisor", "FORETOKEN_TOKEN": "old"}
    found = child_environment(inherited, {"FORETOKEN_TOKEN": "new", "HF_TOKEN": "h"})
    assert found == {MARK: "of the supervisor", "FORETOKEN_TOKEN": "new", "HF_TOKEN": "h", "PYTHONPATH": str(PACKAGES)}
    assert child_environment(inherited, {MARK: "of another"})[MARK] == "of another"


@pytest.mark.parametrize(
    "name",
    [
        *("HF_TOKEN", "REDIS_PASSWORD", "REDISCLI_AUTH", "AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID", "PGPASSWORD"),
        *("OPENAI_API_KEY", "GOOGLE_APPLICATION_CREDENTIALS", "MYSQL_PWD", "db_pass", "SSH_AUTH_SOCK", "npm_token"),
        *("OPENAI_APIKEY", "GPG_PASSPHRASE", "ACCESSTOKEN", "GH_PAT", "AZURE_STORAGE_CONNECTION_STRING", "PGPASSFILE"),
        *("SESSION_COOKIE", "SLACK_WEBHOOK_URL", "JWT"),
    ],
)
def test_secrets_of_others_are_known_by_their_names(name: str) -> None:
    assert name not in child_environment({name: "value"})


@pytest.mark.parametrize("value", ["redis://:pw@h:1/0", "http://user:pw@proxy:3128", "git+https://u:p/w@h/x"])
def test_a_password_within_an_address_is_found_whatever_the_name(value: str) -> None:
    assert "ADDRESS" not in child_environment({"ADDRESS": value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("TOKENIZERS_PARALLELISM", "false"), ("PWD", "/w"), ("OLDPWD", "/o"), ("OMP_NUM_THREADS", "2")),
        *(("http_proxy", "http://proxy:3128"), ("HF_ENDPOINT", "https://hub:8443/a"), ("LD_PRELOAD", "/a:/b")),
        *(("CUDA_VISIBLE_DEVICES", "0"), ("XAUTHORITY", "/x"), ("KEYBOARD", "de"), ("PATH", "/b"), ("JAVA_PATH", "/j")),
    ],
)
def test_what_is_no_secret_stays(name: str, value: str) -> None:
    assert child_environment({name: value})[name] == value


def test_our_code_comes_first_and_is_here() -> None:
    assert python_path({"PYTHONPATH": "/elsewhere"}) == f"{PACKAGES}{os.pathsep}/elsewhere"
    assert python_path({}) == str(PACKAGES)
    assert Path(__file__).is_relative_to(PACKAGES)


def test_rays_variables_are_all_that_begin_so() -> None:
    assert ray_variables({"RAY_ADDRESS": "a", "RAY_x": "1", "ARRAY_X": "2"}) == {"RAY_ADDRESS": "a", "RAY_x": "1"}
