"""The dashboard, the alerts and the scrape configuration use metrics that exist."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from dpnet.pipeline.exporter import HOST, PORT
from dpnet.pipeline.root_metrics import METRICS

FOLDER = Path(__file__).parents[3] / "infra" / "grafana"
DASHBOARD: dict[str, Any] = json.loads((FOLDER / "dpnet.json").read_text("utf-8"))
ALERTS: list[dict[str, Any]] = [
    rule
    for group in yaml.safe_load((FOLDER / "alerts.yml").read_text("utf-8"))["groups"]
    for rule in group["rules"]
]
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]


def names_in(expressions: list[str], prefix: str) -> set[str]:
    return {name for text in expressions for name in re.findall(rf"\b{prefix}_\w+", text)}


def expressions() -> list[str]:
    panels = [target["expr"] for panel in PANELS for target in panel["targets"]]
    variables = [str(each.get("definition", "")) for each in DASHBOARD["templating"]["list"]]
    return [*panels, *variables, *(rule["expr"] for rule in ALERTS)]


def test_every_metric_of_ours_in_use_is_exported_and_all_but_one_are_in_use() -> None:
    used = names_in(expressions(), "dpnet")
    assert used <= METRICS.keys()
    assert METRICS.keys() - used == {"dpnet_up"}


def test_every_metric_of_ray_in_use_is_in_rays_own_dashboards() -> None:
    ray = importlib.util.find_spec("ray")
    if ray is None or ray.origin is None:
        pytest.skip("ray is not installed")
    folder = Path(ray.origin).parent / "dashboard" / "modules" / "metrics" / "dashboards"
    known = names_in([path.read_text("utf-8") for path in folder.glob("*_panels.py")], "ray")
    used = names_in(expressions(), "ray")
    assert used
    assert used <= known


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel["title"])
def test_every_panel_uses_the_chosen_data_source_and_has_a_description(
    panel: dict[str, Any],
) -> None:
    assert panel["description"].endswith(".")
    for each in (panel, *panel["targets"]):
        assert each["datasource"] == {"type": "prometheus", "uid": "${datasource}"}


def test_no_two_panels_have_the_same_number_or_overlap() -> None:
    numbers = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(numbers) == len(set(numbers))
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24
        cells = {(at["x"] + i, at["y"] + j) for i in range(at["w"]) for j in range(at["h"])}
        assert not cells & taken, panel["title"]
        taken |= cells


def test_there_are_alerts_for_stuck_trainings_lost_storage_and_failed_items() -> None:
    named = {rule["alert"].removeprefix("Dpnet"): rule for rule in ALERTS}
    assert {"TrainingStuck", "StorageDown", "FailedSamples"} <= named.keys()
    for rule in ALERTS:
        assert rule["annotations"].keys() == {"summary", "description"}


@pytest.fixture
def promtool() -> str:
    found = shutil.which("promtool")
    if found is None:
        pytest.skip("promtool is not installed")
    return found


def test_each_alert_fires_when_it_should_and_only_then(promtool: str) -> None:
    file = FOLDER.parents[1] / "tests" / "data" / "alerts.test.yml"
    cases = [
        case for test in yaml.safe_load(file.read_text("utf-8"))["tests"]
        for case in test["alert_rule_test"]
    ]  # fmt: skip
    assert {case["alertname"] for case in cases if case["exp_alerts"]} == {
        rule["alert"] for rule in ALERTS
    }
    done = subprocess.run([promtool, "test", "rules", str(file)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def check_config(promtool: str, file: Path) -> None:
    command = [promtool, "check", "config", "--syntax-only", str(file)]
    done = subprocess.run(command, cwd=FOLDER, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_promtool_accepts_the_scrape_configuration(promtool: str) -> None:
    check_config(promtool, FOLDER / "prometheus.yml")


def test_promtool_accepts_the_scrape_configuration_of_a_cluster(
    promtool: str, tmp_path: Path
) -> None:
    config = yaml.safe_load((FOLDER / "prometheus-kubernetes.yml").read_text("utf-8"))
    for job in config["scrape_configs"]:  # Debian's promtool is built without Kubernetes
        assert job.pop("kubernetes_sd_configs")
    (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(config))
    check_config(promtool, tmp_path / "prometheus.yml")


def test_prometheus_scrapes_the_default_address_of_the_exporter() -> None:
    config = yaml.safe_load((FOLDER / "prometheus.yml").read_text("utf-8"))
    jobs = {job["job_name"]: job for job in config["scrape_configs"]}
    assert jobs.keys() == {"dpnet", "ray"}
    (target,) = jobs["dpnet"]["static_configs"][0]["targets"]
    assert target == f"{HOST}:{PORT}"
    assert all((FOLDER / name).is_file() for name in config["rule_files"])


def test_prometheus_in_a_cluster_finds_the_pods_of_the_exporter_and_asks_with_its_user() -> None:
    config = yaml.safe_load((FOLDER / "prometheus-kubernetes.yml").read_text("utf-8"))
    jobs = {job["job_name"]: job for job in config["scrape_configs"]}
    (alert,) = [rule for rule in ALERTS if rule["alert"] == "DpnetExporterDown"]
    assert alert["expr"] == 'up{job="dpnet"} == 0'
    (pods,) = jobs["dpnet"]["kubernetes_sd_configs"]
    assert pods == {"role": "pod", "namespaces": {"names": ["dpnet"]}}
    (rule,) = jobs["dpnet"]["relabel_configs"]
    exporter = FOLDER.parent / "k8s/base/exporter.yaml"
    deployment = next(yaml.safe_load_all(exporter.read_text("utf-8")))
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert labels["app.kubernetes.io/name"] == rule["regex"]
    page = (FOLDER.parents[1] / "docs/operations.md").read_text("utf-8")
    user = jobs["dpnet"]["basic_auth"]["username"]
    assert f"--from-literal=DPNET_REPORTS_PASSWORD={user}:" in page
