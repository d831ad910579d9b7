"""The chart as Helm renders it, against the schemas of Kubernetes and of the operators, and against good policy."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from dinat.app.settings import Settings
from tests.kubernetes.reduce_crds import SCHEMAS

helm = pytest.importorskip("helm_python", reason="helm-python-sdk is not installed")
kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed")

DEPLOY = Path(__file__).parents[2] / "deploy"
CHART = DEPLOY / "kubernetes" / "dinat-serve"
VALUES = {path.stem.removesuffix("-values"): yaml.safe_load(path.read_text()) for path in CHART.glob("ci/*.yaml")}
CUSTOM = json.loads(SCHEMAS.read_text())
KUBERNETES = ["1.33", "1.34", "1.35", "1.36", "1.37"]

Manifest = dict[str, Any]


def render(values: dict[str, Any], name: str = "flowers") -> list[Manifest]:
    with helm.Chart.load(CHART) as chart:
        files = chart.render(values=values, name=name, namespace="vision")
    return [one for path, text in files.items() if path.endswith(".yaml") for one in yaml.safe_load_all(text) if one]


def of(manifests: list[Manifest], kind: str) -> Manifest:
    (one,) = [manifest for manifest in manifests if manifest["kind"] == kind]
    return one


def pod_of(manifest: Manifest) -> Manifest | None:
    """The pod that it makes."""
    spec = manifest["spec"]
    match manifest["kind"]:
        case "Deployment":
            return dict(spec["template"]["spec"])
        case "ServingRuntime":
            return dict(spec)
        case "InferenceService":
            return dict(spec["predictor"])
    return None


def rays_pods() -> Iterator[Manifest]:
    cluster = yaml.safe_load((DEPLOY / "ray" / "rayservice.yaml").read_text())["spec"]["rayClusterConfig"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        yield group["template"]["spec"]


def custom_errors(manifest: Manifest) -> list[str]:
    schema = CUSTOM[f"{manifest['apiVersion']} {manifest['kind']}"]
    found = jsonschema.Draft202012Validator(schema).iter_errors(manifest)
    return [f"{'.'.join(map(str, one.path))}: {one.message}" for one in found if not _int_or_string(one)]


def _int_or_string(error: jsonschema.ValidationError) -> bool:
    return bool(error.schema.get("x-kubernetes-int-or-string")) and isinstance(error.instance, int | str)


@pytest.mark.parametrize("version", KUBERNETES)
@pytest.mark.parametrize("name", sorted(VALUES))
def test_what_the_chart_makes_is_what_kubernetes_takes(name: str, version: str) -> None:
    manifests = render(VALUES[name])
    assert manifests
    for manifest in manifests:
        if f"{manifest['apiVersion']} {manifest['kind']}" in CUSTOM:
            assert custom_errors(manifest) == []
        else:
            kubernetes_validate.validate(manifest, version, strict=True)


def test_the_schemas_would_see_a_fault() -> None:
    deployment = of(render(VALUES["gpu"]), "Deployment")
    deployment["spec"]["template"]["spec"]["containers"][0]["imagePolicy"] = "Always"
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(deployment, KUBERNETES[-1], strict=True)
    service = of(render(VALUES["kserve"]), "InferenceService")
    service["spec"]["predictor"]["containers"][0]["imagePolicy"] = "Always"
    scaled = of(render(VALUES["gpus"]), "ScaledObject")
    scaled["spec"]["maxReplicaCount"] = "many"
    assert len(custom_errors(service)) == len(custom_errors(scaled)) == 1


def test_ray_service_is_what_kuberay_takes() -> None:
    service = yaml.safe_load((DEPLOY / "ray" / "rayservice.yaml").read_text())
    assert custom_errors(service) == []
    (application,) = yaml.safe_load(service["spec"]["serveConfigV2"])["applications"]
    ours = {name: value for name, value in application["args"].items() if not name.endswith("_replicas")}
    assert ours.keys() <= Settings.model_fields.keys()
    assert Settings(_env_file=None, **ours).queue_limit == ours["queue_limit"]


@pytest.mark.parametrize("name", sorted(VALUES))
def test_every_pod_is_without_privilege_and_with_limits(name: str) -> None:
    """As Kubernetes' Pod Security Standard "restricted" has it, and more."""
    pods = [pod for manifest in render(VALUES[name]) if (pod := pod_of(manifest)) is not None]
    assert pods
    for pod in [*pods, *rays_pods()]:
        if "securityContext" in pod:
            assert pod["securityContext"]["runAsNonRoot"] is True
            assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in pod.get("containers", ()):
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
            assert {"cpu", "memory"} <= container["resources"]["limits"].keys() & container["resources"]["requests"].keys()
            image, _, tag = container["image"].rpartition(":")
            assert image
            assert tag not in ("", "latest")
            if "ray" not in container["name"]:
                assert container["securityContext"]["readOnlyRootFilesystem"] is True
                assert {"/cache", "/tmp"} <= {mount["mountPath"] for mount in container["volumeMounts"]}


@pytest.mark.parametrize("name", sorted(VALUES))
def test_the_container_is_told_what_the_service_knows(name: str) -> None:
    for manifest in render(VALUES[name]):
        for container in (pod_of(manifest) or {}).get("containers", ()):
            given = {one["name"]: one.get("value") for one in container["env"]}
            settings = {one.removeprefix("DINAT_").lower(): given[one] for one in given if one.startswith("DINAT_")}
            settings.pop("api_keys", None)
            assert settings.keys() <= Settings.model_fields.keys()
            taken = Settings(_env_file=None, **settings)
            pod = pod_of(manifest) or {}
            if "terminationGracePeriodSeconds" in pod:
                assert pod["terminationGracePeriodSeconds"] >= taken.lame_duck_seconds + taken.drain_seconds + 10
            probes = {container[f"{one}Probe"]["httpGet"]["path"] for one in ("startup", "liveness", "readiness")}
            assert probes == {"/health/live", "/health/ready"}


def test_cards_processors_and_who_may_ask() -> None:
    cpu, gpu, gpus = (render(VALUES[name]) for name in ("cpu", "gpu", "gpus"))
    limits = [of(one, "Deployment")["spec"]["template"]["spec"]["containers"][0]["resources"]["limits"] for one in (cpu, gpu)]
    assert ["nvidia.com/gpu" in one for one in limits] == [False, True]
    assert "replicas" not in of(gpus, "Deployment")["spec"]  # which would undo what the autoscaler has done, at every upgrade
    selector = of(gpu, "Service")["spec"]["selector"]
    for kind, where in (("Deployment", "selector"), ("PodDisruptionBudget", "selector"), ("NetworkPolicy", "podSelector")):
        assert of(gpu, kind)["spec"][where]["matchLabels"] == selector
    assert of(gpus, "ScaledObject")["spec"]["scaleTargetRef"]["name"] == of(gpus, "Deployment")["metadata"]["name"]
    egress = of(cpu, "NetworkPolicy")["spec"]["egress"]
    assert [port["port"] for rule in egress for port in rule["ports"]] == [53, 53]


def test_kserve_brings_the_checkpoint_and_names_it() -> None:
    custom = of(render(VALUES["kserve"]), "InferenceService")
    (container,) = custom["spec"]["predictor"]["containers"]
    env = {one["name"]: one.get("value") for one in container["env"]}
    assert (env["STORAGE_URI"], env["DINAT_MODEL"], env["DINAT_NAME"]) == (
        "s3://models/flowers",
        "/mnt/models",
        custom["metadata"]["name"],
    )
    both = render(VALUES["kserve-runtime"])
    runtime, service = of(both, "ServingRuntime"), of(both, "InferenceService")
    assert service["spec"]["predictor"]["model"]["runtime"] == runtime["metadata"]["name"]
    env = {one["name"]: one.get("value") for one in runtime["spec"]["containers"][0]["env"]}
    assert (env["DINAT_MODEL"], env["DINAT_NAME"]) == ("/mnt/models", "{{.Name}}")


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"image": {"tag": "latest"}}, "tag"),
        ({"replica": 3}, "replica"),
        ({"gpus": -1}, "gpus"),
        ({"resources": {"limits": {"cpu": "1"}}}, "memory"),
        ({"settings": {"queue_limit": 5}}, "queue_limit"),
        ({"settings": {"DEVICE": "cpu"}}, "DEVICE"),
        ({"autoscaling": {"kind": "vpa"}}, "kind"),
    ],
)
def test_a_wrong_value_is_refused_by_its_name(values: dict[str, Any], said: str) -> None:
    if "resources" in values:
        values = {"resources": {"limits": {"cpu": "1", "memory": None}, "requests": {"cpu": "1", "memory": "1Gi"}}}
    with pytest.raises(helm.HelmError, match=said):
        render(values)


def test_every_value_is_described_by_the_schema() -> None:
    values, schema = yaml.safe_load((CHART / "values.yaml").read_text()), json.loads((CHART / "values.schema.json").read_text())
    for name, value in values.items():
        known = schema["properties"][name]
        known = schema["definitions"][known["$ref"].rpartition("/")[2]] if "$ref" in known else known
        if isinstance(value, dict) and "properties" in known:
            assert value.keys() == known["properties"].keys(), name
    assert values.keys() == schema["properties"].keys() - {"global"}
