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
from dpnet.serving.metrics import Metrics
from dpnet.serving.server import PORT as SERVE_PORT

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
    used = names_in(expressions(), "dpnet") - names_in(expressions(), "dpnet_serve")
    assert used <= METRICS.keys()
    assert METRICS.keys() - used == {"dpnet_up"}


def test_every_metric_of_the_page_that_fills_photos_is_served_and_in_use() -> None:
    text = Metrics(lambda: 0, lambda: 0).text("1").decode()
    served = set(re.findall(r"^(dpnet_serve_\w+)[{ ]", text, re.MULTILINE))
    used = names_in(expressions(), "dpnet_serve")
    assert used <= served
    families = re.findall(r"^# HELP (dpnet_serve_\w+) ", text, re.MULTILINE)
    known = [name for name in families if not name.endswith("_created")]
    assert [name for name in known if not any(each.startswith(name) for each in used)] == []


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


def test_prometheus_scrapes_the_default_addresses() -> None:
    config = yaml.safe_load((FOLDER / "prometheus.yml").read_text("utf-8"))
    jobs = {job["job_name"]: job for job in config["scrape_configs"]}
    assert jobs.keys() == {"dpnet", "dpnet-serve", "ray"}
    for name, port in (("dpnet", PORT), ("dpnet-serve", SERVE_PORT)):
        assert jobs[name]["static_configs"][0]["targets"] == [f"{HOST}:{port}"]
    assert all((FOLDER / name).is_file() for name in config["rule_files"])


@pytest.mark.parametrize(("job", "name"), [("dpnet", "exporter"), ("dpnet-serve", "serve")])
def test_prometheus_in_a_cluster_finds_the_pods(job: str, name: str) -> None:
    (pods,) = cluster_jobs()[job]["kubernetes_sd_configs"]
    assert pods == {"role": "pod", "namespaces": {"names": ["dpnet"]}}
    (rule,) = cluster_jobs()[job]["relabel_configs"]
    file = FOLDER.parent / f"k8s/base/{name}.yaml"
    deployment = next(yaml.safe_load_all(file.read_text("utf-8")))
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert labels["app.kubernetes.io/name"] == rule["regex"]
    assert f'up{{job="{job}"}} == 0' in [rule["expr"] for rule in ALERTS]


def cluster_jobs() -> dict[str, Any]:
    config = yaml.safe_load((FOLDER / "prometheus-kubernetes.yml").read_text("utf-8"))
    return {job["job_name"]: job for job in config["scrape_configs"]}


def test_prometheus_in_a_cluster_asks_with_the_user_of_the_exporter() -> None:
    page = (FOLDER.parents[1] / "docs/operations.md").read_text("utf-8")
    user = cluster_jobs()["dpnet"]["basic_auth"]["username"]
    assert f"--from-literal=DPNET_REPORTS_PASSWORD={user}:" in page
