"""The metrics of a root, read with real scrapes."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from small_root import commit

from data_prep.core.errors import PipelineError
from data_prep.core.storage.local import LocalStore
from data_prep.core.storage.open import open_store
from data_prep.core.storage.store import Store
from data_prep.core.web_guard import basic_auth
from dpnet.evaluation.report_script import SCRIPT
from dpnet.pipeline import exporter
from dpnet.pipeline.exporter import serve
from dpnet.pipeline.root_metrics import KEEP_ENDED_S, METRICS, MetricValue, RootReader

Scraped = dict[tuple[str, tuple[str, ...]], float]
TRAIN = {
    "kind": "train",
    "step": 50,
    "losses": {"hole": 0.25, "adversarial": 0.5},
    "seconds": 10.0,
    "data_seconds": 2.5,
    "images_per_second": 80.0,
    "skipped_steps": 1,
    "skipped_samples": 2,
    "gpu_memory_gb": 3.5,
}


def status(at: float, **more: Any) -> bytes:
    validation = {"kind": "validation", "step": 40, "hole_psnr": 21.5}
    record = {"step": 50, "steps": 600, "train": TRAIN, "validation": validation, "time": at}
    return json.dumps({**record, **more}).encode()


def version(store: Store, number: int, samples: int, failed: int) -> None:
    splits = {"train": {"samples": samples, "shards": 1}, "val": {"samples": 7, "shards": 1}}
    summary = {"version": number, "splits": splits, "failed": failed}
    files = {"train-000000.tar": f"{number}".encode()}
    assert isinstance(store, LocalStore)
    commit(store, "images", "images/cats", files, settings={"n": number}, summary=summary)


def scrape(port: int) -> Scraped:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as answer:
        text = answer.read().decode()
    return {
        (sample.name, tuple(sample.labels[name] for name in METRICS[sample.name][1])): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    (tmp_path / "root").mkdir()
    return LocalStore(tmp_path / "root")


@pytest.fixture
def scraped(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Store], Scraped]]:
    """Return a function that scrapes the exporter of a store, which reads at each scrape."""
    monkeypatch.setattr(exporter, "READ_EVERY_S", 0.0)
    servers: dict[str, Any] = {}

    def scrape_store(store: Store) -> Scraped:
        if store.uri not in servers:
            servers[store.uri] = serve(store)
        return scrape(servers[store.uri][1])

    yield scrape_store
    for server, _ in servers.values():
        server.shutdown()
        server.server_close()


def test_a_training_exports_its_progress_speed_and_losses(store, scraped):
    store.write("runs/mine-1/status.json", status(1234.5))
    store.write("runs/mine-1/lease.json", b"{}")
    run = ("mine-1",)
    assert scraped(store) == {
        ("dpnet_up", ()): 1,
        ("dpnet_storage_up", ()): 1,
        ("dpnet_train_step", run): 50,
        ("dpnet_train_steps", run): 600,
        ("dpnet_train_claimed", run): 1,
        ("dpnet_train_last_progress_timestamp_seconds", run): 1234.5,
        ("dpnet_train_images_per_second", run): 80,
        ("dpnet_train_data_wait_share", run): 0.25,
        ("dpnet_train_loss", ("mine-1", "hole")): 0.25,
        ("dpnet_train_loss", ("mine-1", "adversarial")): 0.5,
        ("dpnet_train_gpu_memory_gb", run): 3.5,
        ("dpnet_train_skipped_steps", run): 1,
        ("dpnet_train_skipped_samples", run): 2,
        ("dpnet_validation_hole_psnr", run): 21.5,
    }


def test_a_training_without_a_lease_is_not_claimed(store, scraped):
    store.write("runs/mine-1/status.json", status(1234.5))
    assert scraped(store)["dpnet_train_claimed", ("mine-1",)] == 0


@pytest.mark.parametrize("held", ["lease.json", "lease-training.json"])
def test_a_training_is_claimed_by_its_launcher_or_its_job(store, scraped, held):
    store.write("runs/mine-1/status.json", status(1234.5))
    for name in ("lease.json", "lease-training.json"):
        store.write(f"runs/mine-1/{name}", b"{}" if name == held else b'{"released": true}')
    assert scraped(store)["dpnet_train_claimed", ("mine-1",)] == 1
    store.write(f"runs/mine-1/{held}", b'{"released": true}')
    assert scraped(store)["dpnet_train_claimed", ("mine-1",)] == 0


def test_a_finished_training_is_exported_for_an_hour(store):
    ended = commit(store, "train", "runs", {"log.jsonl": b""}).folder
    store.write(f"{ended}/status.json", status(1000.0))
    reader = RootReader(store)
    assert MetricValue("dpnet_train_step", (ended.removeprefix("runs/"),), 50) in reader.read(
        1010.0
    )
    assert reader.read(1000.0 + KEEP_ENDED_S + 1) == []


def test_only_the_newest_version_of_a_dataset_is_exported(store, scraped):
    version(store, 1, samples=90, failed=3)
    assert scraped(store)["dpnet_dataset_samples", ("cats", "train", "1")] == 90
    version(store, 2, samples=100, failed=4)
    store.write("images/cats/begun/work/train-000000.json", b"{}")
    values = scraped(store)
    assert values["dpnet_dataset_samples", ("cats", "train", "2")] == 100
    assert values["dpnet_dataset_samples", ("cats", "val", "2")] == 7
    assert values["dpnet_dataset_failed", ("cats",)] == 4
    assert ("dpnet_dataset_samples", ("cats", "train", "1")) not in values


def test_the_champion_of_each_model_is_exported(store, scraped):
    store.write("registry/dpnet/champion.json", b'{"version": 3, "hole_psnr": 24.25}')
    store.write("registry/other/v1.json", b'{"version": 1, "hole_psnr": 20.0}')
    values = scraped(store)
    assert values["dpnet_champion_version", ("dpnet",)] == 3
    assert values["dpnet_champion_hole_psnr", ("dpnet",)] == 24.25
    assert ("dpnet_champion_version", ("other",)) not in values


def test_damaged_records_are_left_out_and_all_others_are_exported(store, scraped):
    damaged = {
        "runs/a-1/status.json": b'{"step": ',
        "runs/b-1/status.json": b"[1]",
        "runs/c-1/status.json": status(1.0, step="many"),
        "runs/d-1/status.json": status(1.0, train={"losses": 1}),
        "runs/e-1/status.json": status(1.0, time=None),
        "runs/f-1/status.json": b"\xff\x00",
        "images/cats/123/manifest.json": b"{}",
        "registry/dpnet/champion.json": b'{"version": null}',
    }
    for key, data in damaged.items():
        store.write(key, data)
    store.write("runs/sound-1/status.json", status(1.0))
    store.write("registry/sound/champion.json", b'{"version": 1, "hole_psnr": 20}')
    values = scraped(store)
    labels = {labels[0] for _, labels in values if labels}
    assert labels == {"sound-1", "sound"}
    assert values["dpnet_storage_up", ()] == 1


def test_a_root_that_disappears_and_returns_is_reported(store, scraped):
    store.write("runs/mine-1/status.json", status(1.0))
    assert scraped(store)["dpnet_storage_up", ()] == 1
    away = store.folder.rename(store.folder.with_name("away"))
    assert scraped(store) == {("dpnet_up", ()): 1, ("dpnet_storage_up", ()): 0}
    away.rename(store.folder)
    assert scraped(store)["dpnet_train_step", ("mine-1",)] == 50


def test_a_scrape_does_not_wait_for_a_storage_that_hangs(store, scraped, monkeypatch):
    monkeypatch.setattr(exporter, "WAIT_S", 0.05)
    hangs = True

    class Hanging(LocalStore):
        def folders(self, prefix: str = "") -> Iterator[str]:
            while hangs:
                time.sleep(0.01)
            return super().folders(prefix)

    slow = Hanging(store.folder)
    assert scraped(slow)["dpnet_storage_up", ()] == 0
    hangs = False
    deadline = time.monotonic() + 30
    while scraped(slow)["dpnet_storage_up", ()] == 0:
        assert time.monotonic() < deadline


def test_the_store_is_not_read_at_every_scrape(store):
    server, port = serve(store)
    try:
        assert ("dpnet_train_step", ("mine-1",)) not in scrape(port)
        store.write("runs/mine-1/status.json", status(1.0))
        assert ("dpnet_train_step", ("mine-1",)) not in scrape(port)
    finally:
        server.shutdown()
        server.server_close()


def test_a_root_on_s3_is_exported_like_a_folder(moto_root, scraped):
    store = open_store(moto_root)
    store.write("runs/mine-1/status.json", status(1.0))
    store.write("registry/dpnet/champion.json", b'{"version": 3, "hole_psnr": 24.25}')
    values = scraped(store)
    assert values["dpnet_train_step", ("mine-1",)] == 50
    assert values["dpnet_champion_version", ("dpnet",)] == 3


def test_every_metric_has_our_prefix_and_a_description():
    for name, (description, _) in METRICS.items():
        assert name.startswith("dpnet_")
        assert description.endswith(".")


def test_a_used_port_is_refused(store):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(PipelineError, match=rf"cannot listen on 127\.0\.0\.1:{port}: .*--port"):
            serve(store, port)


def test_the_command_prints_its_address_and_ends_on_sigterm(store):
    command = [sys.executable, "-m", "dpnet.exporter", str(store.folder), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            address = process.stdout.readline().strip()
            with urllib.request.urlopen(address, timeout=30) as answer:
                assert b"dpnet_up 1.0" in answer.read()
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) == 0
        finally:
            process.kill()


def test_the_command_serves_on_a_socket_that_it_inherits(store):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        number = listener.fileno()
        command = [sys.executable, "-m", "dpnet.exporter", str(store.folder)]
        command += ["--listener", str(number)]
        with subprocess.Popen(command, pass_fds=[number], stdout=subprocess.PIPE) as process:
            try:
                # The socket takes the request before the command is ready.
                status, text = answer_of(listener.getsockname()[1])
                assert (status, "dpnet_up 1.0" in text) == (200, True)
            finally:
                process.kill()


def test_the_command_refuses_a_wrong_root_in_one_line(capsys):
    assert exporter.main(["ftp://here"]) == 2
    assert "addresses cannot be used" in capsys.readouterr().err


def script_hash() -> str:
    """Return how a policy names the script of the reports."""
    digest = hashlib.sha256(SCRIPT.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


def test_reports_are_served_and_no_other_file_of_the_root(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    store.write("evaluations/0123456789ab/report.html", b"<p>a report</p>")
    store.write("evaluations/0123456789ab/report.json", b"{}")
    server, port = serve(store)
    try:
        url = f"http://127.0.0.1:{port}/evaluations"
        with urllib.request.urlopen(f"{url}/0123456789ab/report.html") as answer:
            assert answer.read() == b"<p>a report</p>"
            policy = answer.headers["Content-Security-Policy"]
            assert "default-src 'none'" in policy
            assert f"script-src {script_hash()}" in policy
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(f"{url}/aaaaaaaaaaaa/report.html")
        for other in ("0123456789ab/report.json", "../evaluations/0123456789ab/report.html"):
            with urllib.request.urlopen(f"{url}/{other}") as answer:
                assert b"dpnet_up" in answer.read()
    finally:
        server.shutdown()
        server.server_close()


def answer_of(port: int, path: str = "/metrics", **headers: str) -> tuple[int, str]:
    """Return the status and the text of the answer to one request."""
    given = {name.replace("_", "-"): value for name, value in headers.items()}
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", headers=given)
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            assert answer.headers["X-Frame-Options"] == "SAMEORIGIN"
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "evil.example"},
        {"Host": "evil.example:9808"},
        {"Origin": "http://evil.example"},
        {"Sec_Fetch_Site": "cross-site", "Sec_Fetch_Mode": "no-cors"},
    ],
)
def test_requests_of_other_sites_are_refused(store, headers):
    server, port = serve(store)
    assert answer_of(port)[0] == 200
    status, text = answer_of(port, **headers)
    server.shutdown()
    assert status == 403
    assert "dpnet_up" not in text


def test_a_name_that_the_server_was_given_is_its_own(tmp_path):
    """Prometheus reaches it by the name of a Service, and people by that of a forwarded port."""
    command = [sys.executable, "-m", "dpnet.exporter", str(tmp_path), "--port", "0"]
    names = {"DPNET_SERVER_NAMES": "exporter,exporter.dpnet.svc"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, env=os.environ | names)
    try:
        assert process.stdout is not None
        port = int(process.stdout.readline().rpartition(b":")[2].partition(b"/")[0])
        hosts = ("exporter:9808", "exporter.dpnet.svc:9808", "exporter.evil.example:9808")
        assert [answer_of(port, Host=host)[0] for host in hosts] == [200, 200, 403]
    finally:
        process.kill()
        process.wait()


def test_the_exporter_listens_on_this_machine_only(store):
    server, _ = serve(store)
    address = server.server_address[0]
    server.shutdown()
    server.server_close()
    assert address == "127.0.0.1"


def test_with_a_password_every_request_needs_it(store):
    store.write(f"evaluations/{'0' * 12}/report.html", b"a report")
    server, port = serve(store, password="dpnet:secret")
    report = f"/evaluations/{'0' * 12}/report.html"
    assert [answer_of(port, path)[0] for path in ("/metrics", report, "/")] == [401] * 3
    assert answer_of(port, report, Authorization=basic_auth("dpnet:other"))[0] == 401
    assert answer_of(port, report, Authorization=basic_auth("dpnet:secret")) == (200, "a report")
    server.shutdown()


def test_the_health_check_needs_no_password_but_an_own_address(store):
    server, port = serve(store, password="dpnet:secret")
    assert answer_of(port, "/health") == (200, "running\n")
    assert answer_of(port, "/health", Host="rebound.example.com")[0] == 403
    assert answer_of(port, "/healthy")[0] == 401
    server.shutdown()


def test_a_link_that_leaves_the_root_or_the_reports_is_not_followed(store, tmp_path):
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "report.html").write_text("a secret")
    store.write("registry/report.html", b"not a report")
    store.write(f"evaluations/{'2' * 12}/report.html", b"a report")
    folder = store.folder / "evaluations"
    (folder / ("0" * 12)).symlink_to(tmp_path / "secret")
    (folder / ("1" * 12)).symlink_to(store.folder / "registry")
    (folder / ("3" * 12)).symlink_to(folder / ("2" * 12))
    (folder / ("4" * 12)).mkdir()
    (folder / ("4" * 12) / "report.html").symlink_to(tmp_path / "secret" / "report.html")
    (folder / ("5" * 12)).symlink_to(folder / ("5" * 12))  # it leads to itself
    server, port = serve(store)
    found = [answer_of(port, f"/evaluations/{str(n) * 12}/report.html")[0] for n in range(6)]
    server.shutdown()
    assert found[:5] == [404, 404, 200, 200, 404]
    assert found[5] in (404, 503)
