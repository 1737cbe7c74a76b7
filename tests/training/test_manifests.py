"""launch/kubernetes.yaml against the schemas: Kubernetes' own, and the training operator's generated models."""

import copy
import re
from datetime import datetime
from typing import Any

import kubernetes_validate
import pytest
import yaml
from jobs import REPOSITORY
from kubeflow.training import models as kubeflow_models

from syncbn.training import multinode

TEXT = (REPOSITORY / "launch" / "kubernetes.yaml").read_text()
OPERATORS, COMMENTED = re.split(r"^# Without an operator.*?^#\n", TEXT, maxsplit=1, flags=re.MULTILINE | re.DOTALL)
PLAIN = "\n".join(line.removeprefix("#").removeprefix(" ") for line in COMMENTED.splitlines())
(PYTORCH_JOB,) = yaml.safe_load_all(OPERATORS)
SERVICE, JOB = yaml.safe_load_all(PLAIN)


def validate(manifest: dict[str, Any]) -> None:
    """Raises ValueError for what the API server would refuse or silently drop: unknown fields, wrong types, gaps."""
    if manifest["apiVersion"].startswith("kubeflow.org/"):
        fits("KubeflowOrgV1PyTorchJob", manifest, manifest["kind"])
        for replica in manifest["spec"]["pytorchReplicaSpecs"].values():
            pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "any"}, "spec": replica["template"]["spec"]}
            validate(pod)
        return
    try:
        kubernetes_validate.validate(manifest, kubernetes_validate.latest_version(), strict=True)
    except kubernetes_validate.ValidationError as error:
        raise ValueError(f"{list(error.path)}: {error.message}") from error


def fits(name: str, value: Any, path: str) -> None:
    """Compares a value with a type of the operator's generated client, whose models know every field of its schema."""
    if name == "object" or name.startswith("V1"):  # Kubernetes' own, which its own schema judges
        return
    if container := re.fullmatch(r"(?:list\[|dict\(str, )(.+)[\])]", name):
        assert isinstance(value, (list, dict)), path
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in items:
            fits(container[1], item, f"{path}.{key}")
        return
    plain = {"str": str, "int": int, "bool": bool, "datetime": datetime}.get(name)
    if plain is not None:
        if type(value) is not plain:
            raise ValueError(f"{path}: expected {name}, got {value!r}")
        return
    model = getattr(kubeflow_models, name)
    fields = {field: model.openapi_types[attribute] for attribute, field in model.attribute_map.items()}
    if unknown := set(value) - set(fields):
        raise ValueError(f"{path}: unknown fields {unknown}")
    attributes = {field: attribute for attribute, field in model.attribute_map.items()}
    model(**{attributes[field]: item for field, item in value.items()})  # raises ValueError for what is missing
    for field, item in value.items():
        fits(fields[field], item, f"{path}.{field}")


@pytest.mark.parametrize("manifest", [PYTORCH_JOB, SERVICE, JOB], ids=lambda manifest: manifest["kind"])
def test_the_manifest_is_valid(manifest):
    validate(manifest)


def change(manifest: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    changed = copy.deepcopy(manifest)
    *parents, last = path.split(".")
    node: Any = changed
    for key in parents:
        node = node[int(key) if isinstance(node, list) else key]
    if value is None:
        del node[last]
    else:
        node[last] = value
    return changed


WORKER = "spec.pytorchReplicaSpecs.Worker"


@pytest.mark.parametrize(
    ("manifest", "path", "value"),
    [
        (PYTORCH_JOB, "spec.elasticPolicy.maxReplica", 2),  # unknown
        (PYTORCH_JOB, "spec.elasticPolicy.maxRestarts", "10"),  # another type
        (PYTORCH_JOB, "spec.pytorchReplicaSpecs", None),  # missing
        (PYTORCH_JOB, f"{WORKER}.replica", 2),
        (PYTORCH_JOB, f"{WORKER}.template.spec.containers.0.command", "launch/multinode.sh"),
        (PYTORCH_JOB, f"{WORKER}.template.spec.containers.0.arg", ["norm=local"]),
        (SERVICE, "spec.publishNotReady", True),
        (JOB, "spec.completion", 2),
        (JOB, "spec.template.spec.containers.0.env.0.value", 120),
        (JOB, "spec.template.spec.containers", None),
    ],
)
def test_a_mistake_is_refused(manifest, path, value):
    """So that the test above says something."""
    with pytest.raises(ValueError, match=r"."):
        validate(change(manifest, path, value))


def test_both_ways_start_the_same_container():
    (operators,) = PYTORCH_JOB["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]["containers"]
    (plain,) = JOB["spec"]["template"]["spec"]["containers"]
    options = [argument for argument in plain["args"] if argument.startswith("--")]
    assert plain | {"args": plain["args"][len(options) :]} == operators
    volumes = [
        spec["template"]["spec"]["volumes"]
        for spec in (PYTORCH_JOB["spec"]["pytorchReplicaSpecs"]["Worker"], JOB["spec"])
    ]
    assert volumes[0] == volumes[1]


def test_what_the_manifests_ask_of_the_launcher_it_understands(monkeypatch):
    """The operator's variables, as its controller sets them from the policy, and the plain Job's options."""
    job = PYTORCH_JOB
    policy = job["spec"]["elasticPolicy"]
    operator = {
        "PET_RDZV_BACKEND": policy["rdzvBackend"],
        "PET_RDZV_ENDPOINT": f"{job['metadata']['name']}-worker-0:23456",
        "PET_RDZV_ID": policy["rdzvId"],
        "PET_NNODES": f"{policy['minReplicas']}:{policy['maxReplicas']}",
        "PET_MAX_RESTARTS": str(policy["maxRestarts"]),
        "PET_NPROC_PER_NODE": "auto",
    }
    for name, value in operator.items():
        monkeypatch.setenv(name, value)
    (container,) = job["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]["containers"]
    told = asked(container["args"])
    for name in operator:
        monkeypatch.delenv(name)
    (container,) = JOB["spec"]["template"]["spec"]["containers"]
    plain = asked(container["args"])
    assert told[1:] == plain[1:] == ("syncbn", 2, 2, 10, ["ckpt_path=auto", "experiment=coco-fcos"])
    assert (str(told[0]), str(plain[0])) == ("syncbn-worker-0:23456", "syncbn-0.syncbn:29400")
    assert SERVICE["metadata"]["name"] == JOB["spec"]["template"]["spec"]["subdomain"] == "syncbn"


def asked(arguments):
    options, rest = multinode.parse(arguments)
    meeting = multinode.meeting_of(options)
    return meeting.endpoint, meeting.job, meeting.min_nodes, meeting.max_nodes, options.max_restarts, rest
