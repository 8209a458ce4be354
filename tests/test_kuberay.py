"""The manifest for Kubernetes: right for KubeRay, for Kubernetes, for Serve and for us, and no second truth."""

from __future__ import annotations

import copy
import functools
import operator
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import kubernetes_validate
import pytest
import yaml

from deployments.cluster_file import load_config
from tetriserve.cache import cache_folder

ROOT = Path(__file__).parents[1]
MANIFEST = ROOT / "examples" / "kuberay_flux.yaml"
DOCKERFILE = ROOT / "examples" / "Dockerfile"
CLUSTER_FILE = ROOT / "cluster_configs" / "flux_8xh100.yaml"
VOLUME, SERVICE = yaml.safe_load_all(MANIFEST.read_text())
CLUSTER = SERVICE["spec"]["rayClusterConfig"]
(WORKERS,) = CLUSTER["workerGroupSpecs"]
TEMPLATES = {"head": CLUSTER["headGroupSpec"]["template"], "worker": WORKERS["template"]}
KEYS = "TETRISERVE_API_KEYS"
RAY = ("spec", "rayClusterConfig")
GROUP = (*RAY, "workerGroupSpecs", 0)

KUBERNETES = ("1.30", "1.37")
KUBERAY = "v1.6.2"
CRD = (
    f"https://raw.githubusercontent.com/ray-project/kuberay/{KUBERAY}"
    "/helm-chart/kuberay-operator/crds/ray.io_rayservices.yaml"
)
FETCH_S = 10.0

Change = Callable[[dict[str, Any]], object]


@pytest.fixture(scope="module")
def kuberay() -> jsonschema.Draft202012Validator:
    """KubeRay's own schema of a RayService, fetched once and kept in the user's cache folder."""
    file = cache_folder("kuberay") / f"rayservices-{KUBERAY}.yaml"
    if not file.exists():
        try:
            answer = httpx.get(CRD, timeout=FETCH_S)
        except httpx.TransportError as error:
            pytest.skip(f"KubeRay's CRD is not in {file.parent} and cannot be fetched: {error}")
        assert answer.status_code != 404, f"no such file: {CRD}"
        if answer.status_code != 200:
            pytest.skip(f"KubeRay's CRD cannot be fetched: {CRD} answers {answer.status_code}")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(answer.text)
    crd = yaml.load(file.read_text(), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    (version,) = (version for version in crd["spec"]["versions"] if version["name"] == "v1")
    return jsonschema.Draft202012Validator(closed(version["schema"]["openAPIV3Schema"]))


def closed(schema: dict[str, Any]) -> dict[str, Any]:
    """The same schema, but fields that it does not know are refused and not dropped."""
    schema = dict(schema)
    if "properties" in schema:
        schema["properties"] = {name: closed(field) for name, field in schema["properties"].items()}
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            schema["additionalProperties"] = False
    for key in ("items", "additionalProperties"):
        if isinstance(schema.get(key), dict):
            schema[key] = closed(schema[key])
    return schema


def changed(document: dict[str, Any], change: Change) -> dict[str, Any]:
    document = copy.deepcopy(document)
    change(document)
    return document


def renamed(*path: Any, to: str) -> Change:
    """Gives the field at `path` another name."""

    def change(document: Any) -> None:
        parent = functools.reduce(operator.getitem, path[:-1], document)
        parent[to] = parent.pop(path[-1])

    return change


def set_to(value: Any, *path: Any) -> Change:
    def change(document: Any) -> None:
        functools.reduce(operator.getitem, path[:-1], document)[path[-1]] = value

    return change


def test_it_serves_what_the_cluster_file_says_and_asks_for_keys() -> None:
    expected = yaml.safe_load(CLUSTER_FILE.read_text())
    (application,) = expected["applications"]
    application["args"]["http"] = {"api_keys_env": KEYS}
    assert yaml.safe_load(SERVICE["spec"]["serveConfigV2"]) == expected


def test_serve_and_we_accept_it_and_it_fits_the_pod(tmp_path: Path) -> None:
    file = tmp_path / "served.yaml"
    file.write_text(SERVICE["spec"]["serveConfigV2"])
    args = load_config(str(file))[2]
    assert args.http.api_keys_env == KEYS
    (container,) = TEMPLATES["worker"]["spec"]["containers"]
    limits = container["resources"]["limits"]
    assert limits == container["resources"]["requests"]
    assert int(limits["nvidia.com/gpu"]) == args.cell.gpus
    assert int(limits["cpu"]) >= sum(bundle["CPU"] for bundle in args.cell.bundles)
    assert WORKERS["replicas"] == WORKERS["minReplicas"] == WORKERS["maxReplicas"] == 1


def test_ray_is_the_version_that_is_tested() -> None:
    (pinned,) = re.findall(r"^ray==(.+)$", (ROOT / "constraints.txt").read_text(), re.M)
    assert CLUSTER["rayVersion"] == pinned
    assert re.findall(r"^FROM rayproject/ray:([\d.]+)-", DOCKERFILE.read_text(), re.M) == [pinned]


@pytest.mark.parametrize("pod", TEMPLATES)
def test_pods_have_keys_shared_memory_and_the_volumes_they_mount(pod: str) -> None:
    spec = TEMPLATES[pod]["spec"]
    (container,) = spec["containers"]
    secrets = {
        item["name"]: item["valueFrom"]["secretKeyRef"] for item in container["env"] if "valueFrom" in item
    }
    assert secrets[KEYS] == {"name": "tetriserve", "key": "api-keys"}  # not optional: no keys, no start
    volumes = {volume["name"]: volume for volume in spec["volumes"]}
    mounts = {mount["mountPath"]: volumes.pop(mount["name"]) for mount in container["volumeMounts"]}
    assert volumes == {}
    shared = mounts["/dev/shm"]["emptyDir"]
    assert shared["medium"] == "Memory"
    group = {"head": CLUSTER["headGroupSpec"], "worker": WORKERS}[pod]
    (shared_gib,) = re.fullmatch(r"(\d+)Gi", shared["sizeLimit"]).groups()
    assert int(group["rayStartParams"]["object-store-memory"]) < int(shared_gib) * 2**30 / 2
    if pod == "worker":
        environment = {item["name"]: item.get("value") for item in container["env"]}
        claim = mounts[environment["XDG_CACHE_HOME"]]["persistentVolumeClaim"]
        assert claim == {"claimName": VOLUME["metadata"]["name"]}


def test_only_the_token_and_the_cluster_lead_to_the_dashboard() -> None:
    head = CLUSTER["headGroupSpec"]
    assert CLUSTER["authOptions"] == {"mode": "token"}
    assert (head["serviceType"], head["enableIngress"]) == ("ClusterIP", False)
    assert not {"headService", "serveService"} & (head.keys() | SERVICE["spec"].keys())
    for template in TEMPLATES.values():
        assert "hostNetwork" not in template["spec"]
        for container in template["spec"]["containers"]:
            assert not any("hostPort" in port for port in container.get("ports", []))


@pytest.mark.parametrize("version", KUBERNETES)
def test_kubernetes_accepts_pods_and_volume(version: str) -> None:
    def check(template: dict[str, Any]) -> None:
        pod = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "it"}, "template": template}
        kubernetes_validate.validate(pod, version, strict=True)

    for template in TEMPLATES.values():
        check(template)
        for wrong in (
            renamed("spec", "containers", 0, "volumeMounts", to="volumeMount"),
            renamed("spec", "volumes", 0, "emptyDir", "sizeLimit", to="size"),
            renamed("spec", "containers", 0, "env", 0, "valueFrom", "secretKeyRef", "key", to="keys"),
        ):
            with pytest.raises(kubernetes_validate.ValidationError):
                check(changed(template, wrong))
    kubernetes_validate.validate(VOLUME, version, strict=True)


def test_kuberay_accepts_the_service(kuberay: jsonschema.Draft202012Validator) -> None:
    kuberay.validate(SERVICE)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (renamed("spec", "serveConfigV2", to="serveConfig"), "'serveConfig' was unexpected"),
        (renamed("spec", "upgradeStrategy", "type", to="kind"), "'kind' was unexpected"),
        (renamed(*RAY, "workerGroupSpecs", to="workerGroupSpec"), "'workerGroupSpec' was unexpected"),
        (renamed(*RAY, "headGroupSpec", to="headGroup"), "headGroup"),
        (renamed(*RAY, "authOptions", "mode", to="modes"), "'modes' was unexpected"),
        (renamed(*GROUP, "groupName", to="name"), "name"),
        (renamed(*GROUP, "rayStartParams", to="startParams"), "'startParams' was unexpected"),
        (renamed(*GROUP, "template", "spec", "tolerations", to="tolerate"), "'tolerate' was unexpected"),
        (set_to("one", *GROUP, "replicas"), "'one' is not of type 'integer'"),
        (set_to("tokens", *RAY, "authOptions", "mode"), "'tokens' is not one of"),
        (set_to(0, *RAY, "headGroupSpec", "rayStartParams", "num-cpus"), "0 is not of type 'string'"),
    ],
)
def test_kuberay_refuses_a_slip(wrong: Change, said: str, kuberay: jsonschema.Draft202012Validator) -> None:
    with pytest.raises(jsonschema.ValidationError, match=said):
        kuberay.validate(changed(SERVICE, wrong))
