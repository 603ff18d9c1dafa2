"""What an operator applies: Ray's schema for `ray up`, the fields of KubeRay 1.7 and Kubernetes, commands that parse.

An API server drops fields that it does not know without a word. So the fields that these manifests may use are written
out here, and one that is misspelt, or stands a level too high, is found.
"""

import json
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml

from cluster.checkout import EVERYWHERE
from jobs.cli import make_parser
from jobs.commands import ROOT

FOLDER = ROOT / "cluster"
MANIFESTS = sorted(FOLDER.glob("kubernetes/*.yaml"))
IMAGE = "registry.example.com/nightloom:0.1.0"
TEXT, NUMBER, FLAG = str, int, bool
ANY: dict[str, Any] = {}
"""A map whose keys are the user's."""

RESOURCES = {"requests": {"cpu": TEXT, "memory": TEXT, "nvidia.com/gpu": TEXT}}
RESOURCES["limits"] = RESOURCES["requests"]
LOCKED = {"allowPrivilegeEscalation": FLAG, "capabilities": {"drop": [TEXT]}}
TERM = {"matchExpressions": [{"key": TEXT, "operator": TEXT, "values": [TEXT]}]}
POD = {
    "restartPolicy": TEXT,
    "serviceAccountName": TEXT,
    "automountServiceAccountToken": FLAG,
    "terminationGracePeriodSeconds": NUMBER,
    "securityContext": {
        "runAsNonRoot": FLAG,
        "runAsUser": NUMBER,
        "runAsGroup": NUMBER,
        "fsGroup": NUMBER,
        "seccompProfile": {"type": TEXT},
    },
    "affinity": {
        "nodeAffinity": {
            "requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [TERM]},
            "preferredDuringSchedulingIgnoredDuringExecution": [{"weight": NUMBER, "preference": TERM}],
        }
    },
    "tolerations": [{"key": TEXT, "operator": TEXT, "effect": TEXT}],
    "containers": [
        {
            "name": TEXT,
            "image": TEXT,
            "command": [TEXT],
            "securityContext": LOCKED,
            "ports": [{"name": TEXT, "containerPort": NUMBER}],
            "env": [{"name": TEXT, "value": TEXT}],
            "envFrom": [{"secretRef": {"name": TEXT, "optional": FLAG}}],
            "resources": RESOURCES,
            "volumeMounts": [{"name": TEXT, "mountPath": TEXT, "readOnly": FLAG}],
        }
    ],
    "volumes": [{"name": TEXT, "emptyDir": {"medium": TEXT, "sizeLimit": TEXT}, "configMap": {"name": TEXT}}],
}
TEMPLATE = {"metadata": {"annotations": ANY, "labels": ANY}, "spec": POD}
CLUSTER = {
    "rayVersion": TEXT,
    "authOptions": {"mode": TEXT},
    "enableInTreeAutoscaling": FLAG,
    "autoscalerOptions": {
        "version": TEXT,
        "upscalingMode": TEXT,
        "idleTimeoutSeconds": NUMBER,
        "securityContext": LOCKED,
        "resources": RESOURCES,
    },
    "headGroupSpec": {"rayStartParams": ANY, "template": TEMPLATE},
    "workerGroupSpecs": [
        {
            "groupName": TEXT,
            "replicas": NUMBER,
            "minReplicas": NUMBER,
            "maxReplicas": NUMBER,
            "priority": NUMBER,
            "labels": ANY,
            "rayStartParams": ANY,
            "template": TEMPLATE,
        }
    ],
}
JOB = {
    "clusterSelector": ANY,
    "entrypoint": TEXT,
    "submissionMode": TEXT,
    "shutdownAfterJobFinishes": FLAG,
    "ttlSecondsAfterFinished": NUMBER,
    "activeDeadlineSeconds": NUMBER,
    "backoffLimit": NUMBER,
    "rayClusterSpec": CLUSTER,
    "submitterPodTemplate": TEMPLATE,
}
CRON = {
    "schedule": TEXT,
    "timeZone": TEXT,
    "concurrencyPolicy": TEXT,
    "startingDeadlineSeconds": NUMBER,
    "successfulJobsHistoryLimit": NUMBER,
    "failedJobsHistoryLimit": NUMBER,
    "jobTemplate": {
        "spec": {
            "activeDeadlineSeconds": NUMBER,
            "backoffLimit": NUMBER,
            "podFailurePolicy": {
                "rules": [
                    {
                        "action": TEXT,
                        "onExitCodes": {"containerName": TEXT, "operator": TEXT, "values": [NUMBER]},
                        "onPodConditions": [{"type": TEXT}],
                    }
                ]
            },
            "template": TEMPLATE,
        }
    },
}
KINDS: dict[tuple[str, str], dict[str, Any]] = {
    ("ray.io/v1", "RayCluster"): {"spec": CLUSTER},
    ("ray.io/v1", "RayJob"): {"spec": JOB},
    ("ray.io/v1", "RayCronJob"): {"spec": {"schedule": TEXT, "timeZone": TEXT, "jobTemplate": JOB}},
    ("batch/v1", "CronJob"): {"spec": CRON},
    ("v1", "ServiceAccount"): {"automountServiceAccountToken": FLAG},
    ("v1", "ConfigMap"): {"data": ANY},
}
TOP = {"apiVersion": TEXT, "kind": TEXT, "metadata": {"name": TEXT, "generateName": TEXT, "annotations": ANY}}


def unknown(value: Any, shape: Any, path: str = "") -> Iterator[str]:
    """Where a value has another shape than it may."""
    if shape is ANY:
        yield from (path for text in value.values() if not isinstance(text, str))
    elif isinstance(shape, dict):
        if not isinstance(value, dict):
            yield f"{path} is no map"
            return
        for key, inner in value.items():
            if key not in shape:
                yield f"{path}.{key} is not known"
            else:
                yield from unknown(inner, shape[key], f"{path}.{key}")
    elif isinstance(shape, list):
        for at, item in enumerate(value):
            yield from unknown(item, shape[0], f"{path}[{at}]")
    elif type(value) is not shape:
        yield f"{path} is {value!r}"


def documents(path: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(path.read_text()))


def found(value: Any, key: str) -> Iterator[Any]:
    """Every value of a key, however deep."""
    if isinstance(value, dict):
        for name, inner in value.items():
            if name == key:
                yield inner
            yield from found(inner, key)
    elif isinstance(value, list):
        for item in value:
            yield from found(item, key)


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_every_field_is_known(path):
    for document in documents(path):
        shape = TOP | KINDS[document["apiVersion"], document["kind"]]
        assert list(unknown(document, shape)) == []


def test_a_field_that_is_misspelt_is_found():
    (document,) = documents(FOLDER / "kubernetes" / "raycluster.yaml")
    document["spec"]["workerGroupSpecs"][0]["template"]["spec"]["terminationGracePeriod"] = 30
    document["spec"]["rayVersion"] = 2.6
    assert len(list(unknown(document, TOP | KINDS["ray.io/v1", "RayCluster"]))) == 2


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_pods_are_confined_and_know_no_secrets(path):
    for document in documents(path):
        for containers in found(document, "containers"):
            for container in containers:
                assert container["image"] == IMAGE
                assert container["securityContext"] == {
                    "allowPrivilegeEscalation": False,
                    "capabilities": {"drop": ["ALL"]},
                }
                assert set(container["resources"]) == {"requests", "limits"}
                names = {mount["name"] for mount in container.get("volumeMounts", ())}
                (pod,) = [pod for pod in found(document, "spec") if pod.get("containers") is containers]
                assert names == {volume["name"] for volume in pod.get("volumes", ())}
                assert pod["serviceAccountName"] == "nightloom"
                assert pod["securityContext"]["runAsNonRoot"]
                for variable in container.get("env", ()):
                    assert not re.search("KEY|SECRET|TOKEN|PASSWORD", variable["name"])
    assert not re.search(r"AKIA|aws_secret_access_key *[:=] *\S{20}", path.read_text(), re.IGNORECASE)


def clusters() -> list[dict[str, Any]]:
    (standing,), (nightly,) = (documents(FOLDER / "kubernetes" / f"ray{name}.yaml") for name in ("cluster", "cronjob"))
    return [standing["spec"], nightly["spec"]["jobTemplate"]["rayClusterSpec"]]


@pytest.mark.parametrize("spec", clusters(), ids=("standing", "nightly"))
def test_clusters_grow_from_nothing_and_give_machines_time_to_go(spec):
    assert spec["rayVersion"] == ray.__version__
    assert spec["autoscalerOptions"]["version"] == "v2"
    assert spec["authOptions"] == {"mode": "token"}
    assert spec["headGroupSpec"]["rayStartParams"] == {"num-cpus": "0"}
    assert spec["headGroupSpec"]["template"]["spec"]["automountServiceAccountToken"]  # the autoscaler needs it
    groups = {group["groupName"]: group for group in spec["workerGroupSpecs"]}
    assert {"cpu-spot", "gpu-spot"} <= set(groups)
    for name, group in groups.items():
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        assert group["replicas"] == group["minReplicas"] == 0 < group["maxReplicas"]
        assert group["labels"] == {"ray.io/market-type": "spot" if "spot" in name else "on-demand"}
        assert group["priority"] == (10 if "spot" in name else 0)
        assert ("nvidia.com/gpu" in container["resources"]["limits"]) == ("gpu" in name)
        # What a raylet takes to drain fits into what its pod is given to end.
        environment = {variable["name"]: variable["value"] for variable in container["env"]}
        assert int(environment["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"]) < pod["terminationGracePeriodSeconds"]
        assert environment["NIGHTLOOM_ADDRESS"] == "auto"
        # A spot pod prefers spot machines and waits for none; one on demand keeps away from them.
        affinity = pod["affinity"]["nodeAffinity"]
        assert list(affinity) == [
            f"{'preferred' if 'spot' in name else 'required'}DuringSchedulingIgnoredDuringExecution"
        ]


def test_jobs_are_what_the_operator_takes():
    """Rules that stand in KubeRay's code and in no schema."""
    (on_standing,), (nightly,) = (documents(FOLDER / "kubernetes" / f"ray{name}.yaml") for name in ("job", "cronjob"))
    for spec in (on_standing["spec"], nightly["spec"]["jobTemplate"]):
        assert ("clusterSelector" in spec) != ("rayClusterSpec" in spec)
        if "clusterSelector" in spec:
            assert "backoffLimit" not in spec
        if "ttlSecondsAfterFinished" in spec:
            assert spec["shutdownAfterJobFinishes"]
    (standing,) = documents(FOLDER / "kubernetes" / "raycluster.yaml")
    assert on_standing["spec"]["clusterSelector"] == {"ray.io/cluster": standing["metadata"]["name"]}


def commands() -> Iterator[tuple[str, list[str]]]:
    """(manifest, words) of every command of ours in them."""
    for path in MANIFESTS:
        for document in documents(path):
            yield from ((path.name, shlex.split(line)) for line in found(document, "entrypoint"))
            yield from ((path.name, words) for words in found(document, "command"))


@pytest.mark.parametrize(("name", "words"), list(commands()), ids=lambda value: str(value))
def test_commands_parse(name, words):
    assert words[0] == "nightloom"
    options = make_parser().parse_args(words[1:])
    if words[1] == "nightly":
        (settings,) = [d["data"] for d in documents(FOLDER / "kubernetes" / "access.yaml") if d["kind"] == "ConfigMap"]
        assert f"/config/{next(iter(settings))}" in words
        from jobs.nightly import NightlyConfiguration

        (text,) = settings.values()
        tables = tomllib.loads(text)["tables"]
        night = NightlyConfiguration.model_validate(
            {"tables": {name: {"model": "m", **table} for name, table in tables.items()}}
        )
        assert all(table.table.startswith("s3://") for table in night.tables.values())
    assert options.json


def test_ray_up_keeps_to_its_schema():
    jsonschema = pytest.importorskip("jsonschema")
    schema = json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text())
    config = yaml.safe_load((FOLDER / "aws.yaml").read_text())
    jsonschema.validate(config, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(config | {"max_wokers": 3}, schema)
    types = config["available_node_types"]
    assert types["head"]["resources"]["CPU"] == 0
    for name, kind in types.items():
        is_spot = kind["node_config"].get("InstanceMarketOptions") == {"MarketType": "spot"}
        assert kind["labels"] == {"ray.io/market-type": "spot" if is_spot else "on-demand"}
        assert is_spot == ("spot" in name)
        assert kind["node_config"]["MetadataOptions"]["HttpTokens"] == "required"
        assert "IamInstanceProfile" in kind["node_config"]


def test_commands_of_ray_up_are_those_of_this_ray():
    """By the parsers that will read them: of `ray start`, and of our own sidecar."""
    from ray.scripts.scripts import cli

    from cluster import spot

    config = yaml.safe_load((FOLDER / "aws.yaml").read_text())
    starts = [*config["head_start_ray_commands"], *config["worker_start_ray_commands"]]
    for command in starts:
        words = shlex.split(command.replace("$RAY_HEAD_IP", "10.0.0.1"))
        if words[:2] == ["ray", "start"]:
            context = cli.commands["start"].make_context("ray start", words[2:])
            assert context.params["head"] == (command in config["head_start_ray_commands"])
            assert context.params["dashboard_host"] in ("127.0.0.1", "localhost")
    (sidecar,) = [command for command in starts if "cluster.spot" in command]
    words = shlex.split(sidecar.replace("$RAY_HEAD_IP", "10.0.0.1"))
    options = spot.make_parser().parse_args(words[words.index("cluster.spot") + 1 : words.index(">")])
    assert (options.cloud, options.address) == ("aws", "10.0.0.1:6379")


def test_the_image_is_pinned_small_and_no_root():
    text = (FOLDER / "Dockerfile").read_text()
    lines = [line.strip() for line in re.sub(r"\\\n\s*", "", text).splitlines() if line and line[0] != "#"]
    steps = [line.split(maxsplit=1) for line in lines]
    assert {name for name, _ in steps} <= {"FROM", "RUN", "WORKDIR", "COPY", "ENV", "USER", "CMD"}
    bases = [rest for name, rest in steps if name == "FROM"]
    assert len(bases) == 2
    assert all(re.fullmatch(r"python:3\.11\.\d+-slim-bookworm( AS build)?", base) for base in bases)
    last = steps[[at for at, (name, _) in enumerate(steps) if name == "FROM"][-1] :]
    assert ["USER", "1000:1000"] in last
    assert not any(name == "RUN" for name, _ in last[last.index(["USER", "1000:1000"]) :])
    assert any("--constraint constraints.txt" in rest for name, rest in steps if name == "RUN")
    for name, rest in steps:
        if name == "RUN" and "apt-get install" in rest:
            assert "--no-install-recommends" in rest
            assert "rm -rf /var/lib/apt/lists/*" in rest
        if name == "COPY" and not rest.startswith("--from"):
            for source in rest.split()[:-1]:
                assert (ROOT / source).exists()
    # What is copied reaches the builder, and nothing hidden does.
    ignored = (FOLDER / "Dockerfile.dockerignore").read_text().split()
    copied = {source for name, rest in steps if name == "COPY" and "--from" not in rest for source in rest.split()[:-1]}
    assert {f"!{source}" for source in copied} <= set(ignored)
    assert "**/.*" in ignored
    assert ".*" in EVERYWHERE
