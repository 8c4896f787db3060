"""values.yaml, its schema and cluster.config say the same; what is wrong is refused with words that name it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from cluster.config import Settings
from cluster.silence import least_orphan_s, least_reroute_s
from tests.support.chart import CHART, Values, refusal

VALUES: dict[str, Any] = yaml.safe_load((CHART / "values.yaml").read_text())
SCHEMA: dict[str, Any] = json.loads((CHART / "values.schema.json").read_text())
OWN = {  # the chart sets them itself
    *("model", "revision", "served_model_name", "home", "host", "port"),
    *("cluster_name", "store", "token"),  # what the processes of a release share, two of them secrets
    *("api_key", "api_key_file", "admin_api_key"),  # in a Secret
    "advertise",  # a pod's own address
    *("attention_workers", "expert_workers"),  # as many as the groups have
}
NOT_SERVED = {"data", "local"}  # of benches, and of one machine


def _leaves_and_branches(values: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for key, value in values.items():
        yield (*path, key), value
        for inner in [value, *value] if isinstance(value, list) else [value]:
            if isinstance(inner, dict):
                yield from _leaves_and_branches(inner, (*path, key))


def _resolve(schema: dict[str, Any]) -> dict[str, Any]:
    while "$ref" in schema:
        schema = SCHEMA["definitions"][schema["$ref"].rpartition("/")[2]]
    return schema


def test_each_key_has_a_comment_above_it() -> None:
    lines = (CHART / "values.yaml").read_text().splitlines()
    keys = [number for number, line in enumerate(lines) if re.match(r"\s*(- )?\w+:", line)]
    without = [lines[number] for number in keys if not lines[number - 1].lstrip().startswith("# ")]
    assert len(keys) == len(list(_leaves_and_branches(VALUES)))
    assert without == []


@pytest.mark.parametrize("path", sorted({path for path, _ in _leaves_and_branches(VALUES)}), ids=".".join)
def test_each_key_is_in_the_schema(path: tuple[str, ...]) -> None:
    schema = SCHEMA
    for key in path:
        schema = _resolve(schema)
        schema = _resolve(schema.get("items", schema))
        schema = schema["properties"][key] if "properties" in schema else schema["additionalProperties"]


def test_the_schema_is_closed_and_has_no_key_of_its_own() -> None:
    def check(schema: dict[str, Any], values: dict[str, Any], path: str) -> None:
        schema = _resolve(schema)
        assert schema["additionalProperties"] is False, path
        if path != ".settings":  # not all of them have a value here: cluster.config has the defaults
            assert set(schema["properties"]) == set(values), path
        for key, value in values.items():
            if isinstance(value, dict) and "properties" in _resolve(schema["properties"][key]) and value:
                check(schema["properties"][key], value, f"{path}.{key}")

    check(SCHEMA, VALUES, "")


def test_every_value_in_the_schema_has_a_type_or_a_list_of_choices() -> None:
    def check(schema: dict[str, Any], path: str) -> None:
        assert {"type", "enum", "const", "anyOf", "$ref"} & set(schema), path
        for branch in schema.get("anyOf", []):
            check(branch, path)
        for key, inner in schema.get("properties", {}).items():
            check(inner, f"{path}.{key}")
        if isinstance(schema.get("items"), dict):
            check(schema["items"], f"{path}[]")

    check(SCHEMA, "")
    for name, definition in SCHEMA["definitions"].items():
        check(definition, name)


def test_the_settings_are_those_of_the_server_but_the_charts_own() -> None:
    assert set(SCHEMA["properties"]["settings"]["properties"]) == set(Settings.model_fields) - OWN - NOT_SERVED


@pytest.mark.parametrize("name", sorted(SCHEMA["properties"]["settings"]["properties"]))
def test_a_setting_has_the_servers_bounds(name: str) -> None:
    ours = SCHEMA["properties"]["settings"]["properties"][name]
    theirs = Settings.model_json_schema()["properties"][name]
    (theirs,) = [branch for branch in theirs.get("anyOf", [theirs]) if branch.get("type") != "null"]
    if name == "kv_cache_bytes":  # a size: a number of bytes or a text with a unit
        assert {branch["type"] for branch in ours["anyOf"]} == {branch["type"] for branch in theirs["anyOf"]}
        return
    bounds = {"minimum", "exclusiveMinimum", "pattern", "enum"} | (set() if name.endswith("_s") else {"maximum"})
    assert {key: ours.get(key) for key in bounds} == {key: theirs.get(key) for key in bounds}
    assert ours.get("type", "string") == theirs["type"]


GROUP = VALUES["workerGroups"][1]
BAD: list[tuple[str, Values, str]] = [  # a name, values, what the message must have
    ("unknown at the top", {"replicas": 2}, "replicas"),
    ("unknown below", {"server": {"replica": 2}}, "replica"),
    ("a setting of the chart's own", {"settings": {"port": 9000}}, "port"),
    ("an unknown setting", {"settings": {"max_seqs": 4}}, "max_seqs"),
    ("a setting out of range", {"settings": {"max_num_seqs": 0}}, "max_num_seqs"),
    ("a setting that is none of the choices", {"settings": {"numerics": "exact"}}, "numerics"),
    ("a setting of the wrong type", {"settings": {"prefix_cache": "yes"}}, "prefix_cache"),
    ("a size that is none", {"settings": {"kv_cache_bytes": "much"}}, "kv_cache_bytes"),
    ("no drain timeout", {"settings": {"drain_timeout_s": None}}, "drain_timeout_s"),
    ("a text for a number", {"server": {"replicas": "2"}}, "replicas"),
    ("negative replicas", {"server": {"replicas": -1}}, "replicas"),
    ("half a GPU", {"server": {"gpus": 0.5}}, "gpus"),
    ("a memory that is none", {"server": {"resources": {"limits": {"memory": "4 GB"}}}}, "memory"),
    ("a label that is none", {"server": {"podLabels": {"team": "a b"}}}, "team"),
    ("an unknown toleration", {"server": {"tolerations": [{"keys": "gpu"}]}}, "keys"),
    ("a variable without a name", {"server": {"extraEnv": [{"value": "1"}]}}, "name"),
    ("no start time", {"server": {"startupSeconds": 0}}, "startupSeconds"),
    ("a digest that is none", {"image": {"digest": "sha256:12"}}, "digest"),
    ("a tag in the repository's name", {"image": {"repository": "Foretoken"}}, "repository"),
    ("an unknown pull policy", {"image": {"pullPolicy": "Sometimes"}}, "pullPolicy"),
    ("a model that is no id", {"model": {"name": "https://example.com/model"}}, "model.name"),
    ("an unknown kind of cache", {"cache": {"kind": "ram"}}, "cache.kind"),
    ("an unknown kind of service", {"service": {"type": "ExternalName"}}, "service.type"),
    ("a port that is none", {"service": {"port": 70000}}, "service.port"),
    ("a host with a path", {"ingress": {"hosts": ["llm.example.com/v1"]}}, "ingress.hosts"),
    ("a budget that is none", {"podDisruptionBudget": {"maxUnavailable": "most"}}, "maxUnavailable"),
    ("a source that is none", {"networkPolicy": {"from": [{"pods": {}}]}}, "networkPolicy.from"),
    ("a name with capitals", {"fullnameOverride": "Blue"}, "fullnameOverride"),
    ("a Redis without a tag", {"redis": {"image": {"tag": ""}}}, "redis.image.tag"),
    ("an unknown mode", {"mode": "ray"}, "mode"),
    ("a key among the settings", {"settings": {"api_key": "secret"}}, "api_key"),
    ("a key of a Secret that is none", {"apiKeys": {"existingSecretAdminKey": "a b"}}, "existingSecretAdminKey"),
    ("a token among the settings", {"settings": {"token": "secret"}}, "token"),
    ("a store among the settings", {"settings": {"store": "redis://h"}}, "store"),
    ("a number of workers among the settings", {"settings": {"expert_workers": 3}}, "expert_workers"),
    ("three controllers", {"controller": {"replicas": 3}}, "controller.replicas"),
    ("no gateway", {"gateway": {"replicas": 0}}, "gateway.replicas"),
    ("an unknown role", {"workerGroups": [GROUP | {"role": "all"}]}, "workerGroups.0.role"),
    ("a group without a role", {"workerGroups": [{k: v for k, v in GROUP.items() if k != "role"}]}, "role"),
    ("a group without limits", {"workerGroups": [GROUP | {"resources": {"requests": {}}}]}, "limits"),
    ("a group with capitals", {"workerGroups": [GROUP | {"name": "H100"}]}, "workerGroups.0.name"),
    ("a group with a long name", {"workerGroups": [GROUP | {"name": "h" * 25}]}, "workerGroups.0.name"),
    ("an empty group", {"workerGroups": [GROUP | {"replicas": 0}]}, "workerGroups.0.replicas"),
    ("two GPUs for a worker", {"workerGroups": [GROUP | {"gpus": 2}]}, "workerGroups.0.gpus"),
    ("an unknown key of a group", {"workerGroups": [GROUP | {"gpu": 1}]}, "gpu"),
    ("an unknown cache of a group", {"workerGroups": [GROUP | {"cache": {"kind": "ram"}}]}, "cache.kind"),
    ("a namespace of the store that is none", {"store": {"namespace": "a:b"}}, "store.namespace"),
    ("a namespace that is Redis's own user", {"store": {"namespace": "default"}}, "store.namespace"),
]  # fmt: skip


@pytest.mark.needs("helm")
@pytest.mark.parametrize(("values", "word"), [case[1:] for case in BAD], ids=[case[0] for case in BAD])
def test_a_bad_value_is_refused_by_name(values: Values, word: str) -> None:
    message = refusal(values)
    assert "schema" in message
    assert word in message


CLUSTER: Values = {"mode": "cluster", "redis": {"enabled": True}}
CONTRADICTIONS: list[tuple[Values, str]] = [
    ({"cache": {"kind": "existingClaim"}}, "cache.existingClaim: name the PersistentVolumeClaim"),
    ({"cache": {"existingClaim": "models"}}, "cache.existingClaim: is used with cache.kind existingClaim only"),
    ({"huggingFace": {"token": "a", "existingSecret": "b"}}, "huggingFace.token and huggingFace.existingSecret"),
    ({"apiKeys": {"existingSecretMetricsKey": "one"}}, "apiKeys.existingSecretMetricsKey: is used with"),
    ({"model": {"revision": "main"}}, "model.revision: needs model.name"),
    ({"autoscaling": {"minReplicas": 5}}, "autoscaling.minReplicas: must not be larger"),
    ({"ingress": {"enabled": True}}, "ingress.hosts: name at least one host"),
    ({"server": {"extraEnv": [{"name": "FORETOKEN_PORT", "value": "1"}]}}, "server.extraEnv: FORETOKEN_PORT"),
    ({"model": {"name": "/var/lib/foretoken/m"}}, "model.name: a folder is on a volume"),
    ({"redis": {"enabled": True}}, "redis.enabled: a server has no store"),
    ({"store": {"existingSecret": "store"}}, "store.existingSecret: a server has no store"),
    ({"mode": "cluster"}, "store.existingSecret: mode cluster needs a store"),
    ({**CLUSTER, "store": {"existingSecret": "store"}}, "redis.enabled and store.existingSecret: give one"),
    ({**CLUSTER, "workerGroups": []}, "workerGroups: mode cluster needs a group with role attention"),
    (
        {**CLUSTER, "workerGroups": VALUES["workerGroups"][:1]},
        "workerGroups: mode cluster needs a group with role expert",
    ),
    ({**CLUSTER, "workerGroups": [*VALUES["workerGroups"], GROUP]}, "two groups with role expert are called main"),
    (
        {**CLUSTER, "workerGroups": [*VALUES["workerGroups"], GROUP | {"name": "more", "replicas": 255}]},
        "workerGroups: 257 workers with role expert",
    ),
    (
        {**CLUSTER, "fullnameOverride": "f" * 40},
        f"workerGroups: {'f' * 40}-attention-main has 55 characters, and a StatefulSet's name 52",
    ),
    (
        {**CLUSTER, "workerGroups": [VALUES["workerGroups"][0], GROUP | {"cache": {"kind": "existingClaim"}}]},
        "workerGroups: cache.existingClaim of main: name the PersistentVolumeClaim",
    ),
    (
        {**CLUSTER, "model": {"name": "/var/lib/foretoken/m"}, "cache": {"kind": "perPod"}},
        "model.name: a folder must be there for every pod",
    ),
    (
        {**CLUSTER, "workerGroups": [*VALUES["workerGroups"], GROUP | {"name": "h100", "gpus": 1}]},
        "workerGroups: groups with role expert must all have a GPU, or none",
    ),
    (
        {
            **CLUSTER,
            "model": {"name": "/var/lib/foretoken/m"},
            "cache": {"kind": "existingClaim", "existingClaim": "models"},
            "workerGroups": [VALUES["workerGroups"][0], GROUP | {"cache": {"kind": "ephemeral"}}],
        },
        "workerGroups: cache.kind of main: model.name is a folder",
    ),
    (
        {**CLUSTER, "settings": {"lease_s": 4.5}},
        f"settings.orphan_timeout_s: 60 must be at least {least_orphan_s(4.5):g} where settings.lease_s is 4.5",
    ),
    (
        {**CLUSTER, "settings": {"orphan_timeout_s": 19.5}},
        f"settings.orphan_timeout_s: 19.5 must be at least {least_orphan_s(1.0):g} where settings.lease_s is 1",
    ),
    (
        {**CLUSTER, "settings": {"reroute_timeout_s": 52}},
        "settings.reroute_timeout_s: 52 must be at least 53 where settings.lease_s is 1",
    ),
    (
        {**CLUSTER, "settings": {"lease_s": 10, "orphan_timeout_s": 150, "reroute_timeout_s": 89.5}},
        f"settings.reroute_timeout_s: 89.5 must be at least {least_reroute_s(10.0):g} where settings.lease_s is 10",
    ),
    (
        {**CLUSTER, "worker": {"extraEnv": [{"name": "FORETOKEN_TOKEN", "value": "1"}]}},
        "worker.extraEnv: FORETOKEN_TOKEN would hide",
    ),
]


@pytest.mark.needs("helm")
@pytest.mark.parametrize(("values", "words"), CONTRADICTIONS, ids=[words[:48] for _, words in CONTRADICTIONS])
def test_values_that_contradict_each_other_are_refused_in_words(values: Values, words: str) -> None:
    assert words in refusal(values)
