"""The chart as a whole: it lints, renders, and its objects are Kubernetes' own."""

from __future__ import annotations

import re
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from tests.support.chart import CHART, FULLNAME, RELEASE, VALUE_SETS, Object, Values, helm, objects, rendered

pytestmark = pytest.mark.needs("helm", "kubernetes_validate")

OLDEST = "1.25"  # as docs/operations.md promises
NOT_KUBERNETES = {"ServiceMonitor"}  # of an operator; test_templates.py reads it
SETS = pytest.mark.parametrize("name", VALUE_SETS)
RECOMMENDED = ("name", "instance", "component", "version", "part-of", "managed-by")


@SETS
def test_it_lints(name: str) -> None:
    done = helm("lint", "--strict", str(CHART), values=VALUE_SETS[name])
    assert done.returncode == 0, done.stdout + done.stderr
    assert "[WARNING]" not in done.stdout + done.stderr


@SETS
@pytest.mark.parametrize("version", [OLDEST, "newest"])
def test_kubernetes_takes_every_object(name: str, version: str) -> None:
    import kubernetes_validate

    version = kubernetes_validate.latest_version() if version == "newest" else version
    checked = [found for found in objects(VALUE_SETS[name]) if found["kind"] not in NOT_KUBERNETES]
    for found in checked:
        kubernetes_validate.validate(found, version, strict=True)
    assert len(checked) >= 5


def test_kubernetes_would_not_take_a_wrong_one() -> None:
    import kubernetes_validate

    wrong = objects({})[0] | {"spce": {}}
    with pytest.raises(kubernetes_validate.ValidationError, match="spce"):
        kubernetes_validate.validate(wrong, OLDEST, strict=True)


def test_every_template_is_used() -> None:
    sources = {
        source for values in VALUE_SETS.values() for source in re.findall(r"# Source: foretoken/(.+)", rendered(values))
    }
    files = {path.relative_to(CHART).as_posix() for path in (CHART / "templates").rglob("*.yaml")}
    assert sources == files


def test_every_helper_is_used() -> None:
    text = "\n".join(path.read_text() for path in (CHART / "templates").rglob("*.*"))
    defined = re.findall(r'define "([^"]+)"', text)
    assert len(defined) == len(set(defined)) > 5
    assert set(re.findall(r'include "([^"]+)"', text)) == set(defined)


@SETS
def test_names_are_unique_and_begin_with_the_release(name: str) -> None:
    names = Counter((found["kind"], found["metadata"]["name"]) for found in objects(VALUE_SETS[name]))
    assert set(names.values()) == {1}
    assert all(called.startswith(RELEASE) for _, called in names)


@SETS
def test_labels_are_the_recommended_ones(name: str) -> None:
    for found in objects(VALUE_SETS[name]):
        labels = found["metadata"]["labels"]
        assert {f"app.kubernetes.io/{key}" for key in RECOMMENDED} <= set(labels)
        assert labels["app.kubernetes.io/instance"] == RELEASE


def _pods(found: Object) -> list[Object]:
    if found["kind"] == "Pod":
        return [found["spec"]]
    return [found["spec"]["template"]["spec"]] if found["kind"] in ("Deployment", "StatefulSet") else []


@SETS
def test_every_pod_is_locked_down(name: str) -> None:
    pods = [pod for found in objects(VALUE_SETS[name]) for pod in _pods(found)]
    assert len(pods) >= 2
    for pod in pods:
        assert pod["automountServiceAccountToken"] is False
        assert pod["enableServiceLinks"] is False
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod)
        for container in pod["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            assert container["resources"]["limits"]["memory"]
            assert container["resources"]["requests"]["cpu"]


def test_a_long_release_name_leaves_room_for_suffixes() -> None:
    done = helm("template", "a" * 53, str(CHART), values=VALUE_SETS["hub"])
    assert done.returncode == 0, done.stderr
    names = re.findall(r"^  name: (\S+)$", done.stdout, re.MULTILINE)
    assert names
    assert max(map(len, names)) <= 52  # a StatefulSet adds 11 characters to it in a label of at most 63


def test_a_release_of_the_charts_name_is_not_named_twice() -> None:
    done = helm("template", "foretoken", str(CHART))
    assert "name: foretoken\n" in done.stdout
    assert "foretoken-foretoken" not in done.stdout


@pytest.fixture
def notes(tmp_path: Path) -> Callable[[Values], str]:
    """What an installation says. Only a cluster makes Helm show it: here it is rendered as an object's text."""
    chart = tmp_path / "foretoken"
    shutil.copytree(CHART, chart)
    text = (CHART / "templates" / "NOTES.txt").read_text()
    (chart / "templates" / "_notes.tpl").write_text('{{- define "notes" -}}\n' + text + "{{- end }}\n")
    (chart / "templates" / "notes.yaml").write_text('kind: Notes\ntext: {{ include "notes" . | quote }}\n')

    def show(values: Values) -> str:
        done = helm("template", RELEASE, str(chart), "--show-only", "templates/notes.yaml", values=values)
        assert done.returncode == 0, done.stderr
        shown: str = yaml.safe_load(done.stdout)["text"]
        return shown

    return show


def test_the_notes_say_where_the_key_is_and_when_it_can_be_read_on_its_way(notes: Callable[[Values], str]) -> None:
    inside = notes({})
    assert f"get secret {FULLNAME}-keys -o go-template='{{{{ index .data \"keys\" | base64decode }}}}'" in inside
    assert '-H "Authorization: Bearer $FORETOKEN_API_KEY"' in inside
    assert f"deployment/{FULLNAME}" in inside
    theirs = notes({"apiKeys": {"existingSecret": "llm-keys", "existingSecretKey": "tenants"}})
    assert "get secret llm-keys -o go-template='{{ index .data \"tenants\" | base64decode }}'" in theirs
    assert "OUTSIDE" not in inside
    assert "OUTSIDE" in notes({"service": {"type": "LoadBalancer"}})
    ingress = {"enabled": True, "hosts": ["llm.example.com"]}
    assert "OUTSIDE" in notes({"ingress": ingress})
    assert "OUTSIDE" not in notes({"ingress": ingress | {"tlsSecret": "llm-tls"}})


def test_the_notes_name_what_an_ephemeral_cache_costs(notes: Callable[[Values], str]) -> None:
    assert "fetches the weights again" in notes({})
    kept = notes({"cache": {"kind": "perPod"}})
    assert "fetches the weights again" not in kept
    assert f"statefulset/{FULLNAME}" in kept


def test_the_notes_of_a_cluster_name_its_gateways_and_its_status(notes: Callable[[Values], str]) -> None:
    shown = notes(VALUE_SETS["cluster"])
    assert f"deployment/{FULLNAME}-gateway" in shown
    assert f"exec deployment/{FULLNAME}-controller -- foretoken cluster status --config" in shown
    assert "2 attention and 2 expert workers" in shown
    assert "cluster status" not in notes({})
    assert "7200 s" in notes(VALUE_SETS["cluster_example"])
