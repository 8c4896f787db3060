from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import pytest
import typer
from typer.testing import CliRunner

from cluster import cli
from cluster.config import Settings, flag_name
from cluster.errors import ConfigError

ROOT = Path(__file__).resolve().parents[3]


def _foretoken(*arguments: str, environment: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("FORETOKEN_")}
    return subprocess.run(
        [sys.executable, "-m", "cluster.cli", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=ROOT,
        env=clean | dict(environment or {}),
    )


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[Settings]:
    """The settings that `serve` was called with; no server is started."""
    import cluster.serve

    calls: list[Settings] = []
    monkeypatch.setattr(cluster.serve, "run", lambda settings: calls.append(settings) or 0)
    return calls


def test_help_lists_the_commands() -> None:
    shown = _foretoken("--help")
    assert shown.returncode == 0
    for command in ("serve", "generate", "doctor", "bench"):
        assert command in shown.stdout


def test_help_imports_neither_torch_nor_the_gateway() -> None:
    program = "import sys, cluster.cli; print([n for n in ('torch', 'grpc', 'fastapi', 'uvicorn') if n in sys.modules])"
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True)
    assert shown.stdout.strip() == "[]"


NO_FLAG = {"data", "token", "admin_api_key"}
OF_CLUSTERS = {
    "cluster_name", "local", "attention_workers", "expert_workers", "expert_copies", "store", "advertise",
    "lease_s", "peer_timeout_s", "reroute_timeout_s", "orphan_timeout_s",
}  # fmt: skip


@pytest.mark.parametrize(("command", "left_out"), [(["serve"], OF_CLUSTERS), (["cluster", "up"], set())])
def test_every_setting_but_the_datas_folder_and_two_secrets_is_a_flag(command: list[str], left_out: set[str]) -> None:
    found = typer.main.get_command(cli.app)
    for name in command:
        found = found.commands[name]  # type: ignore[attr-defined]
    flags = {flag for parameter in found.params for flag in parameter.opts}
    assert {flag_name(name) for name in set(Settings.model_fields) - left_out - {"model", *NO_FLAG}} <= flags
    assert not {"--token", "--admin-api-key"} & flags  # a secret would stand in the list of processes


def test_serve_passes_flags_over_the_file(served: list[Settings], tmp_path: Path) -> None:
    config = tmp_path / "serve.yaml"
    config.write_text("port: 1234\nmax_num_seqs: 5\n")
    arguments = [
        "serve",
        "org/model",
        "--port",
        "0",
        "--drain-timeout",
        "2.5",
        "--no-prefix-cache",
        "--config",
        str(config),
    ]
    assert CliRunner().invoke(cli.app, arguments).exit_code == 0
    (settings,) = served
    assert (settings.model, settings.port, settings.max_num_seqs) == ("org/model", 0, 5)
    assert (settings.drain_timeout_s, settings.prefix_cache, settings.log_level) == (2.5, False, "info")


def test_serve_without_a_model_leaves_it_to_the_settings(served: list[Settings]) -> None:
    assert CliRunner().invoke(cli.app, ["serve"], env={"FORETOKEN_MODEL": "from/environment"}).exit_code == 0
    assert served[0].model == "from/environment"


def test_a_bad_value_is_one_line_and_exit_code_1() -> None:
    shown = _foretoken("serve", "--device", "gpu")
    assert shown.returncode == 1
    assert shown.stdout == ""
    assert shown.stderr.startswith("Error: device = 'gpu' (from --device)")
    assert shown.stderr.count("\n") == 1


@pytest.mark.parametrize("command", [["cluster", "up"], ["cluster", "status"]])
def test_a_password_on_the_command_line_is_refused_and_not_repeated(command: list[str]) -> None:
    shown = _foretoken(*command, "--store", "redis://:s3cret@h:1/0")
    assert shown.returncode == 1
    assert shown.stderr.startswith("Error: --store redis://h:1/0 was given with a password")
    assert "FORETOKEN_STORE" in shown.stderr
    assert "s3cret" not in shown.stdout + shown.stderr


@pytest.mark.parametrize("arguments", [["doctor", "--config"], ["cluster", "status"], ["cluster", "up", "--help"]])
def test_no_command_shows_a_secret(arguments: list[str]) -> None:
    environment = {"FORETOKEN_STORE": "redis://:s3cret@127.0.0.1:1/0", "FORETOKEN_TOKEN": "s3cret"}
    shown = _foretoken(*arguments, environment=environment)
    assert "s3cret" not in shown.stdout + shown.stderr
    if arguments[0] == "doctor":
        lines = {line.split()[0]: line.split()[1:] for line in shown.stdout.splitlines()}
        assert lines["store"] == ["redis://127.0.0.1:1/0", "FORETOKEN_STORE"]


def test_an_unknown_option_is_a_usage_error() -> None:
    assert _foretoken("serve", "--colour", "red").returncode == 2


def test_doctor_shows_where_settings_come_from(tmp_path: Path) -> None:
    config = tmp_path / "serve.yaml"
    config.write_text("port: 1234\n")
    shown = _foretoken("doctor", "--config", str(config), environment={"FORETOKEN_MAX_NUM_SEQS": "3"})
    assert shown.returncode == 0
    lines = {line.split()[0]: line.split()[1:] for line in shown.stdout.splitlines()}
    assert lines["port"] == ["1234", str(config)]
    assert lines["max_num_seqs"] == ["3", "FORETOKEN_MAX_NUM_SEQS"]
    assert lines["host"] == ["127.0.0.1", "default"]


def test_doctor_config_needs_no_file_and_refuses_an_unknown_key(tmp_path: Path) -> None:
    assert _foretoken("doctor", "--config").returncode == 0
    config = tmp_path / "serve.yaml"
    config.write_text("prot: 1234\n")
    shown = _foretoken("doctor", "--config", str(config))
    assert shown.returncode == 1
    assert "unknown key 'prot'; did you mean 'port'?" in shown.stderr


def test_doctor_examines_the_machine_and_exits_0() -> None:
    shown = _foretoken("doctor")
    assert shown.returncode == 0
    for what in ("processor", "memory", "Python", "torch", "disk for FORETOKEN_HOME"):
        assert what in shown.stdout


def test_generate_refuses_what_the_api_refuses() -> None:
    shown = _foretoken("generate", "--prompt", "a", "--temperature", "nan", "--json")
    assert shown.returncode == 1
    assert shown.stdout == ""
    assert "temperature" in shown.stderr


def test_bench_passes_its_arguments_on_and_returns_its_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[list[str]] = []
    monkeypatch.setitem(
        sys.modules, "loadtests.serve", SimpleNamespace(main=lambda arguments: calls.append(list(arguments)) or 3)
    )
    arguments = ["--quick", "--json", "rows.json", "--base-url", "http://127.0.0.1:1", "--help"]
    assert CliRunner().invoke(cli.app, ["bench", "serve", *arguments]).exit_code == 3
    assert calls == [arguments]


def test_errors_of_ours_reach_main_and_others_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise ConfigError("what to do")

    monkeypatch.setattr(cli, "app", refuse)
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 1
    monkeypatch.setattr(cli, "app", lambda: json.loads("{"))
    with pytest.raises(json.JSONDecodeError):
        cli.main()
