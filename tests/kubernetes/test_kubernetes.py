"""The rendered Helm chart: schemas of Kubernetes and of the operators, pod security, settings."""

import json
import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from dinat.app.settings import Settings
from tests.kubernetes import values_table
from tests.kubernetes.reduce_crds import SCHEMAS

helm = pytest.importorskip("helm_python", reason="helm-python-sdk is not installed")
kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed")

DEPLOY = Path(__file__).parents[2] / "deploy"
CHART = DEPLOY / "kubernetes" / "dinat-serve"
VALUES = {path.stem.removesuffix("-values"): yaml.safe_load(path.read_text()) for path in CHART.glob("ci/*.yaml")}
CUSTOM_SCHEMAS = json.loads(SCHEMAS.read_text())
KUBERNETES_VERSIONS = ["1.33", "1.34", "1.35", "1.36", "1.37"]

Manifest = dict[str, Any]


def render(values: dict[str, Any], name: str = "flowers") -> list[Manifest]:
    with helm.Chart.load(CHART) as chart:
        files = chart.render(values=values, name=name, namespace="vision")
    documents = [document for path, text in files.items() if path.endswith(".yaml") for document in yaml.safe_load_all(text)]
    return [document for document in documents if document]


def notes(values: dict[str, Any]) -> str:
    """What Helm prints after an installation."""
    with helm.Chart.load(CHART) as chart:
        return str(chart.render(values=values, name="flowers", namespace="vision")[f"{CHART.name}/templates/NOTES.txt"])


def only(manifests: list[Manifest], kind: str) -> Manifest:
    """The only manifest of a kind."""
    (found,) = [manifest for manifest in manifests if manifest["kind"] == kind]
    return found


def pod_spec(manifest: Manifest) -> Manifest | None:
    """The spec of the pods that a manifest creates, None if it creates none."""
    spec = manifest["spec"]
    match manifest["kind"]:
        case "Deployment":
            return dict(spec["template"]["spec"])
        case "ServingRuntime":
            return dict(spec)
        case "InferenceService":
            return dict(spec["predictor"])
    return None


def environment(container: Manifest) -> dict[str, str | None]:
    """Environment variables of a container; None for a value from a Secret."""
    return {variable["name"]: variable.get("value") for variable in container["env"]}


def ray_pod_specs() -> Iterator[Manifest]:
    cluster = yaml.safe_load((DEPLOY / "ray" / "rayservice.yaml").read_text())["spec"]["rayClusterConfig"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        yield group["template"]["spec"]


def custom_errors(manifest: Manifest) -> list[str]:
    schema = CUSTOM_SCHEMAS[f"{manifest['apiVersion']} {manifest['kind']}"]
    errors = jsonschema.Draft202012Validator(schema).iter_errors(manifest)
    return [f"{'.'.join(map(str, error.path))}: {error.message}" for error in errors if not _is_int_or_string(error)]


def _is_int_or_string(error: jsonschema.ValidationError) -> bool:
    """Whether the value has the Kubernetes type int-or-string, which JSON Schema does not know."""
    return bool(error.schema.get("x-kubernetes-int-or-string")) and isinstance(error.instance, int | str)


@pytest.mark.parametrize("version", KUBERNETES_VERSIONS)
@pytest.mark.parametrize("name", sorted(VALUES))
def test_rendered_manifests_match_the_schemas(name: str, version: str) -> None:
    manifests = render(VALUES[name])
    assert manifests
    for manifest in manifests:
        if f"{manifest['apiVersion']} {manifest['kind']}" in CUSTOM_SCHEMAS:
            assert custom_errors(manifest) == []
        else:
            kubernetes_validate.validate(manifest, version, strict=True)


def test_schemas_detect_invalid_fields() -> None:
    deployment = only(render(VALUES["gpu"]), "Deployment")
    deployment["spec"]["template"]["spec"]["containers"][0]["imagePolicy"] = "Always"
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(deployment, KUBERNETES_VERSIONS[-1], strict=True)
    service = only(render(VALUES["kserve"]), "InferenceService")
    service["spec"]["predictor"]["containers"][0]["imagePolicy"] = "Always"
    scaled = only(render(VALUES["gpus"]), "ScaledObject")
    scaled["spec"]["maxReplicaCount"] = "many"
    assert len(custom_errors(service)) == len(custom_errors(scaled)) == 1


def test_documented_route_sends_a_share_to_each_of_two_releases() -> None:
    page = (DEPLOY.parent / "docs" / "traffic.md").read_text()
    (text,) = [block for block in re.findall(r"```yaml\n(.*?)```", page, re.DOTALL) if "kind: HTTPRoute" in block]
    route = yaml.safe_load(text)
    assert custom_errors(route) == []
    backends = route["spec"]["rules"][0]["backendRefs"]
    services = [only(render(VALUES["cpu"], name=release), "Service") for release in ("blue", "green")]
    assert [(backend["name"], backend["port"]) for backend in backends] == [
        (service["metadata"]["name"], service["spec"]["ports"][0]["port"]) for service in services
    ]
    assert sum(backend["weight"] for backend in backends) == 100


def test_another_checkpoint_is_rolled_out_before_the_old_pod_stops() -> None:
    before, after = (only(render({"model": model, "gpus": 0}), "Deployment")["spec"] for model in ("/models/a", "/models/b"))
    assert before["strategy"] == {"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": 0, "maxSurge": 1}}
    models = [environment(spec["template"]["spec"]["containers"][0])["DINAT_MODEL"] for spec in (before, after)]
    assert models == ["/models/a", "/models/b"]
    assert before["selector"] == after["selector"]


def test_ray_service_matches_the_schema_of_kuberay() -> None:
    service = yaml.safe_load((DEPLOY / "ray" / "rayservice.yaml").read_text())
    assert custom_errors(service) == []
    (application,) = yaml.safe_load(service["spec"]["serveConfigV2"])["applications"]
    settings = {name: value for name, value in application["args"].items() if not name.endswith("_replicas")}
    assert settings.keys() <= Settings.model_fields.keys()
    assert Settings(_env_file=None, **settings).queue_limit == settings["queue_limit"]
    assert find_spec(application["import_path"].partition(":")[0]) is not None


@pytest.mark.parametrize("name", sorted(VALUES))
def test_every_pod_is_unprivileged_and_has_limits(name: str) -> None:
    """Stricter than the Pod Security Standard "restricted"."""
    pods = [pod for manifest in render(VALUES[name]) if (pod := pod_spec(manifest)) is not None]
    assert pods
    for pod in [*pods, *ray_pod_specs()]:
        if "securityContext" in pod:
            assert pod["securityContext"]["runAsNonRoot"] is True
            assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in pod.get("containers", ()):
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
            assert "memory" in container["resources"]["limits"]
            assert {"cpu", "memory"} <= container["resources"]["requests"].keys()
            image, _, tag = container["image"].rpartition(":")
            assert image
            assert tag not in ("", "latest")
            if "ray" not in container["name"]:
                assert container["securityContext"]["readOnlyRootFilesystem"] is True
                assert {"/cache", "/tmp"} <= {mount["mountPath"] for mount in container["volumeMounts"]}


@pytest.mark.parametrize("name", sorted(VALUES))
def test_container_environment_consists_of_valid_settings(name: str) -> None:
    for manifest in render(VALUES[name]):
        for container in (pod_spec(manifest) or {}).get("containers", ()):
            values = {
                name.removeprefix("DINAT_").lower(): value
                for name, value in environment(container).items()
                if name.startswith("DINAT_")
            }
            values.pop("api_keys_file", None)  # mounted
            assert values.keys() <= Settings.model_fields.keys()
            settings = Settings(_env_file=None, **values)
            pod = pod_spec(manifest) or {}
            if "terminationGracePeriodSeconds" in pod:
                assert pod["terminationGracePeriodSeconds"] >= settings.lame_duck_seconds + settings.drain_seconds + 10
            probes = {container[f"{kind}Probe"]["httpGet"]["path"] for kind in ("startup", "liveness", "readiness")}
            assert probes == {"/health/live", "/health/ready"}


def test_gpu_limits_selectors_autoscaling_and_egress() -> None:
    cpu, gpu, gpus = (render(VALUES[name]) for name in ("cpu", "gpu", "gpus"))
    pods = [only(manifests, "Deployment")["spec"]["template"]["spec"] for manifests in (cpu, gpu)]
    assert ["nvidia.com/gpu" in pod["containers"][0]["resources"]["limits"] for pod in pods] == [False, True]
    assert "replicas" not in only(gpus, "Deployment")["spec"]  # every upgrade would reset the autoscaler's value
    selector = only(gpu, "Service")["spec"]["selector"]
    for kind, field in (("Deployment", "selector"), ("PodDisruptionBudget", "selector"), ("NetworkPolicy", "podSelector")):
        assert only(gpu, kind)["spec"][field]["matchLabels"] == selector
    assert only(gpus, "ScaledObject")["spec"]["scaleTargetRef"]["name"] == only(gpus, "Deployment")["metadata"]["name"]
    egress = only(cpu, "NetworkPolicy")["spec"]["egress"]
    assert [port["port"] for rule in egress for port in rule["ports"]] == [53, 53]


def test_values_of_a_platform_team() -> None:
    manifests = render(VALUES["platform"])
    deployment = only(manifests, "Deployment")["spec"]
    pod = deployment["template"]["spec"]
    (container,) = pod["containers"]
    env = environment(container)
    assert (env["DINAT_MAX_UPLOAD_BYTES"], env["DINAT_MAX_WAIT_MS"], env["DINAT_SELF_CHECK"]) == ("20971520", "0.5", "false")
    assert env["HTTPS_PROXY"] == "http://proxy:3128"
    assert env["DINAT_API_KEYS_FILE"] == "/run/secrets/dinat/api-keys"
    assert container["envFrom"] == [{"configMapRef": {"name": "common"}}]
    assert container["resources"]["limits"] == {"memory": "8Gi", "nvidia.com/gpu": 1}
    assert pod["securityContext"] == {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}}
    mounts = {mount["name"] for mount in container["volumeMounts"]}
    assert mounts == {volume["name"] for volume in pod["volumes"]} == {"cache", "tmp", "ca", "api-keys"}
    assert deployment["template"]["metadata"]["labels"]["team"] == "vision"
    assert deployment["strategy"] == {"type": "Recreate"}
    assert len(pod["topologySpreadConstraints"]) == 1
    service = only(manifests, "Service")
    (rule,) = only(manifests, "Ingress")["spec"]["rules"]
    assert rule["http"]["paths"][0]["backend"]["service"]["name"] == service["metadata"]["name"]
    (backend,) = only(manifests, "HTTPRoute")["spec"]["rules"][0]["backendRefs"]
    assert (backend["name"], backend["port"]) == (service["metadata"]["name"], service["spec"]["ports"][0]["port"])
    alerts = yaml.safe_load((DEPLOY / "prometheus" / "alerts.yml").read_text())
    assert only(manifests, "PrometheusRule")["spec"] == alerts
    policy = only(manifests, "NetworkPolicy")["spec"]
    assert [port["port"] for rule in policy["egress"] for port in rule["ports"]] == [53, 53, 443, 3128, 4318]
    peers = [peer["namespaceSelector"]["matchLabels"].values() for peer in policy["ingress"][0]["from"]]
    assert [name for (name,) in peers] == ["ingress-nginx", "gateways"]


@pytest.mark.parametrize(
    ("values", "is_blocked"),
    [
        ({}, False),
        ({"ingress": {"enabled": True}}, True),
        ({"httpRoute": {"enabled": True}}, True),
        ({"ingress": {"enabled": True}, "networkPolicy": {"from": [{"namespaceSelector": {}}]}}, False),
        ({"ingress": {"enabled": True}, "networkPolicy": {"enabled": False}}, False),
    ],
)
def test_notes_warn_of_an_ingress_that_the_network_policy_may_block(values: dict[str, Any], is_blocked: bool) -> None:
    assert ("add that\nto networkPolicy.from" in notes(values)) is is_blocked


def test_notes_name_the_secrets_and_the_header_of_the_key() -> None:
    text = notes({"apiKeys": {"secret": "dinat-keys"}, "huggingFace": {"secret": "hub"}})
    assert "curl -H 'X-API-Key: KEY' -F image=@image.jpg localhost:8000/classify\n" in text
    assert "require the Secret dinat-keys in" in text
    assert "require the Secret hub in" in text
    assert "curl -F image=@image.jpg localhost:8000/classify\n" in notes({})
    assert "Secret" not in notes({})


@pytest.mark.parametrize(
    ("cache", "strategy"),
    [
        ({"kind": "pod"}, "RollingUpdate"),
        ({"kind": "claim"}, "Recreate"),  # two nodes cannot mount the volume
        ({"kind": "claim", "accessMode": "ReadWriteMany"}, "RollingUpdate"),
        ({"kind": "claim", "claim": "mine"}, "RollingUpdate"),
    ],
)
def test_upgrade_does_not_wait_for_a_volume(cache: dict[str, str], strategy: str) -> None:
    assert only(render({"cache": cache}), "Deployment")["spec"]["strategy"]["type"] == strategy


@pytest.mark.parametrize("number", [1, 1024, 2**21, 2**31, 0.25, 1.5, 30])
def test_numbers_of_settings_are_not_rounded(number: float) -> None:
    (container,) = only(render({"settings": {"MAX_UPLOAD_BYTES": number}}), "Deployment")["spec"]["template"]["spec"][
        "containers"
    ]
    assert environment(container)["DINAT_MAX_UPLOAD_BYTES"] == str(number)


def test_kserve_downloads_the_checkpoint_and_sets_the_name() -> None:
    custom = only(render(VALUES["kserve"]), "InferenceService")
    (container,) = custom["spec"]["predictor"]["containers"]
    env = environment(container)
    assert (env["STORAGE_URI"], env["DINAT_MODEL"], env["DINAT_NAME"]) == (
        "s3://models/flowers",
        "/mnt/models",
        custom["metadata"]["name"],
    )
    both = render(VALUES["kserve-runtime"])
    runtime, service = only(both, "ServingRuntime"), only(both, "InferenceService")
    assert service["spec"]["predictor"]["model"]["runtime"] == runtime["metadata"]["name"]
    env = environment(runtime["spec"]["containers"][0])
    assert (env["DINAT_MODEL"], env["DINAT_NAME"]) == ("/mnt/models", "{{.Name}}")


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"image": {"tag": "latest"}}, "tag"),
        ({"replica": 3}, "replica"),
        ({"gpus": -1}, "gpus"),
        ({"resources": {"limits": {"cpu": "many"}}}, "cpu"),
        ({"ingress": {"enabled": True, "hosts": [{"host": "a", "paths": []}]}}, "paths"),
        ({"apiKeys": {"secret": "keys"}, "settings": {"KEYLESS": "metrics"}}, "KEYLESS must contain health"),
        ({"settings": {"queue_limit": 5}}, "queue_limit"),
        ({"settings": {"DEVICE": "cpu"}}, "DEVICE"),
        ({"autoscaling": {"kind": "vpa"}}, "kind"),
    ],
)
def test_invalid_value_is_rejected_with_its_name(values: dict[str, Any], field: str) -> None:
    with pytest.raises(helm.HelmError, match=field):
        render(values)


def test_schema_describes_every_value() -> None:
    values, schema = yaml.safe_load((CHART / "values.yaml").read_text()), json.loads((CHART / "values.schema.json").read_text())
    for name, value in values.items():
        described = schema["properties"][name]
        if "$ref" in described:
            described = schema["definitions"][described["$ref"].rpartition("/")[2]]
        if value and isinstance(value, dict) and "properties" in described:
            assert value.keys() == described["properties"].keys(), name
    assert values.keys() == schema["properties"].keys() - {"global"}


def test_readme_of_the_chart_describes_the_values() -> None:
    assert values_table.README.read_text() == values_table.readme(), "run python -m tests.kubernetes.values_table"


@pytest.mark.parametrize("name", ["", *sorted(VALUES)])
def test_chart_has_no_lint(name: str) -> None:
    result = helm.lint(CHART, VALUES.get(name, {}), strict=True, kube_version="1.37.0")
    assert result["errors"] == []
    assert [message["error"] for message in result["messages"]] == ["icon is recommended"]
