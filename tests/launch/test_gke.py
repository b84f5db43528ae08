"""The JobSets in `launch/gke` against the documented fields of JobSet v1alpha2 and of what a Job and a pod are made of.

The schema below is written from the API reference (jobset.sigs.k8s.io, kubernetes.io): only the fields named here exist.
"""

import copy
import re
from typing import Any

import pytest
import yaml
from places import ROOT

FILES = sorted((ROOT / "launch" / "gke").glob("*.yaml"))


class Need:
    """A field that must be there."""

    def __init__(self, schema: Any):
        self.schema = schema


def one_of(*values: str) -> re.Pattern:
    return re.compile("|".join(map(re.escape, values)))


NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
LABELS = {re.compile(r"[\w./-]+"): str}

CONTAINER = {
    "name": Need(NAME),
    "image": Need(str),
    "command": [str],
    "args": [str],
    "ports": [{"containerPort": Need(int), "name": str}],
    "env": [{"name": Need(re.compile(r"[A-Z][A-Z0-9_]*")), "value": str, "valueFrom": {"fieldRef": {"fieldPath": Need(str)}}}],
    "volumeMounts": [{"name": Need(NAME), "mountPath": Need(re.compile(r"/.+")), "readOnly": bool}],
    "resources": {"limits": {re.compile(r"[\w./-]+"): (int, str)}, "requests": {re.compile(r"[\w./-]+"): (int, str)}},
}
POD = {
    "restartPolicy": one_of("Never", "OnFailure"),
    "terminationGracePeriodSeconds": int,
    "nodeSelector": LABELS,
    "hostNetwork": bool,
    "containers": Need([CONTAINER]),
    "volumes": [
        {
            "name": Need(NAME),
            "hostPath": {"path": Need(str), "type": one_of("DirectoryOrCreate", "Directory")},
            "csi": {"driver": Need(str), "readOnly": bool, "volumeAttributes": LABELS},
            "emptyDir": {"medium": one_of("Memory", ""), "sizeLimit": str},
        }
    ],
}
JOB = {
    "parallelism": int,
    "completions": int,
    "completionMode": one_of("Indexed", "NonIndexed"),
    "backoffLimit": int,
    "podFailurePolicy": {
        "rules": Need(
            [
                {
                    "action": Need(one_of("FailJob", "FailIndex", "Ignore", "Count")),
                    "onExitCodes": {"containerName": str, "operator": Need(one_of("In", "NotIn")), "values": Need([int])},
                    "onPodConditions": [{"type": Need(str), "status": Need(one_of("True", "False", "Unknown"))}],
                }
            ]
        )
    },
    "template": Need({"metadata": {"labels": LABELS, "annotations": LABELS}, "spec": Need(POD)}),
}
JOBSET = {
    "apiVersion": Need(one_of("jobset.x-k8s.io/v1alpha2")),
    "kind": Need(one_of("JobSet")),
    "metadata": Need({"name": Need(NAME), "namespace": NAME, "labels": LABELS, "annotations": LABELS}),
    "spec": Need(
        {
            "replicatedJobs": Need(
                [{"name": Need(NAME), "replicas": int, "groupName": NAME, "template": Need({"spec": Need(JOB)})}]
            ),
            "network": {"enableDNSHostnames": bool, "subdomain": NAME, "publishNotReadyAddresses": bool},
            "successPolicy": {"operator": Need(one_of("All", "Any")), "targetReplicatedJobs": [NAME]},
            "failurePolicy": {
                "maxRestarts": int,
                "restartStrategy": one_of("Recreate", "BlockingRecreate"),
                "rules": [
                    {
                        "name": re.compile(r"[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?"),
                        "action": Need(one_of("FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts")),
                        "onJobFailureReasons": [
                            one_of(
                                "BackoffLimitExceeded",
                                "DeadlineExceeded",
                                "FailedIndexes",
                                "MaxFailedIndexesExceeded",
                                "PodFailurePolicy",
                            )
                        ],
                        "targetReplicatedJobs": [NAME],
                    }
                ],
            },
            "suspend": bool,
            "coordinator": {"replicatedJob": Need(NAME), "jobIndex": int, "podIndex": int},
            "ttlSecondsAfterFinished": int,
        }
    ),
}


def faults(value: Any, schema: Any, where: str = "") -> list[str]:
    """What does not fit the schema, by path."""
    if isinstance(schema, Need):
        return faults(value, schema.schema, where)
    if isinstance(schema, re.Pattern):
        return [] if isinstance(value, str) and schema.fullmatch(value) else [f"{where}: {value!r} is not {schema.pattern}"]
    if isinstance(schema, list):
        if not isinstance(value, list):
            return [f"{where}: {value!r} is no list"]
        return [fault for i, item in enumerate(value) for fault in faults(item, schema[0], f"{where}[{i}]")]
    if isinstance(schema, dict):
        return _object_faults(value, schema, where)
    fits = isinstance(value, schema) and (schema is bool or not isinstance(value, bool))
    return [] if fits else [f"{where}: {value!r} is not {schema}"]


def _object_faults(value: Any, schema: dict, where: str) -> list[str]:
    if not isinstance(value, dict):
        return [f"{where}: {value!r} is no object"]
    found = [f"{where}.{key}: missing" for key, kind in schema.items() if isinstance(kind, Need) and key not in value]
    for key, item in value.items():
        kind = schema.get(key) or next(
            (kind for name, kind in schema.items() if isinstance(name, re.Pattern) and name.fullmatch(key)), None
        )
        found += [f"{where}.{key}: no such field"] if kind is None else faults(item, kind, f"{where}.{key}")
    return found


@pytest.fixture(params=FILES, ids=lambda path: path.name)
def jobset(request) -> dict:
    return yaml.safe_load(request.param.read_text())


def test_the_fields_are_those_of_the_api(jobset):
    assert faults(jobset, JOBSET) == []


def test_the_schema_refuses(jobset):
    for change, words in (
        (lambda s: s.update(apiVersion="jobset.x-k8s.io/v1"), "apiVersion"),
        (lambda s: s["spec"].update(restartPolicy="Always"), "restartPolicy: no such field"),
        (lambda s: s["spec"]["failurePolicy"].update(maxRestarts="3"), "maxRestarts"),
        (lambda s: s["spec"]["replicatedJobs"][0].pop("name"), "name: missing"),
        (lambda s: s["spec"]["failurePolicy"]["rules"][0].update(action="Restart"), "action"),
    ):
        broken = copy.deepcopy(jobset)
        change(broken)
        assert any(words in fault for fault in faults(broken, JOBSET)), words


def test_restarts(jobset):
    """Preemption and lost machines restart without limit, crashes a few times, one lost pod ends all."""
    (job,) = jobset["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    assert spec["backoffLimit"] == 0 and spec["completionMode"] == "Indexed"
    assert spec["parallelism"] == spec["completions"]
    codes = [rule["onExitCodes"]["values"] for rule in spec["podFailurePolicy"]["rules"] if "onExitCodes" in rule]
    assert codes == [[85]]
    (rule,) = jobset["spec"]["failurePolicy"]["rules"]
    assert rule["action"] == "RestartJobSetAndIgnoreMaxRestarts" and rule["onJobFailureReasons"] == ["PodFailurePolicy"]
    assert 0 < jobset["spec"]["failurePolicy"]["maxRestarts"] < 10


def test_names_that_must_agree(jobset):
    """Volumes are those that are mounted; the coordinator is the first pod of the set; counts are one number."""
    (job,) = jobset["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    assert all(
        rule["onExitCodes"]["containerName"] == container["name"]
        for rule in spec["podFailurePolicy"]["rules"]
        if "onExitCodes" in rule
    )
    env = {item["name"]: item.get("value") for item in container["env"]}
    if "JAX_COORDINATOR_ADDRESS" in env:
        name = jobset["metadata"]["name"]
        assert env["JAX_COORDINATOR_ADDRESS"] == f"{name}-{job['name']}-0-0.{name}:{container['ports'][0]['containerPort']}"
        assert int(env["JAX_NUM_PROCESSES"]) == spec["completions"]
    assert env["JAX_PLATFORMS"] in ("tpu,cpu", "cuda,cpu")
    assert "dip_jax" in container["command"]
