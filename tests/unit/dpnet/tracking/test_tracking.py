"""A running training in MLflow: every record once, and no harm from a bad server."""

import json
import os
import shutil
import socket
import time
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path

import pytest
import small_root

from data_prep.core.errors import PipelineError
from data_prep.core.stage import Request, Work
from data_prep.core.storage.local import LocalStore
from data_prep.core.storage.open import open_store
from dpnet.registry.settings import RegisterSettings
from dpnet.registry.stage import register
from dpnet.tracking import mlflow_client
from dpnet.tracking import mlflow_follower as tracking
from dpnet.tracking.mlflow_follower import MlflowFollower
from dpnet.tracking.run_log import Journal

SETTINGS = {"train": {"steps": 75, "batch_size": 2}}


def trained(step, hole=0.2, **more):
    """Return a record of 25 training steps that took 5 s, with 1 s of waiting for data."""
    record = {"kind": "train", "step": step, "losses": {"hole": hole}, "gradients": {"all": 1.5}}
    record |= {"images": 50, "seconds": 5.0, "data_seconds": 1.0, "other_seconds": 2.5}
    return record | {"skipped_steps": 0, "skipped_samples": 3} | more


def validated(step, psnr):
    found = {"kind": "validation", "step": step, "hole_psnr": psnr, "mean_fill_psnr": 9.0}
    # The first record is that of an earlier version.
    return found | ({"smooth_fill_psnr": 11.0} if step else {})


LOG = [
    validated(0, 10.0),
    trained(25, 0.3),
    trained(50, 0.2, gpu_memory_gb=7.5),
    validated(50, 12.0),
    trained(75, 0.1),
    validated(75, 13.0),
]


@pytest.fixture(autouse=True)
def often(monkeypatch):
    monkeypatch.setattr(tracking, "EVERY_S", 0.05)


@pytest.fixture
def store(tmp_path):
    return small_root.new_store(tmp_path / "root")


@pytest.fixture
def uri(store):
    return f"sqlite:///{store.folder}/mlflow.db"


def test_only_the_user_may_read_mlflows_database_whoever_made_it(uri, store):
    path = store.folder / "mlflow.db"
    before = os.umask(0)
    try:
        for rights in (None, 0o666):  # a new one, and one of an older version
            path.unlink() if rights is None else path.chmod(rights)
            client = mlflow_client.new_client(uri)
            client.create_experiment(f"made with {rights}")
            files = list(store.folder.glob("mlflow.db*"))
            assert {file.stat().st_mode & 0o777 for file in files} == {0o600}
    finally:
        os.umask(before)


def work_in(store):
    request = Request("train", "small", "runs", SETTINGS)
    return Work(store, request.folder, request, lease=None)


def publish(work, log, pictures=()):
    """Publish what a running training publishes."""
    with closing(Journal(work.store, work.folder)) as journal:
        for step in pictures:
            journal.picture(step, b"png of step %d" % step)
        journal.log(log)
        journal.status({"step": log[-1]["step"], "records": len(log)})


def track(uri, work, log, error=None, **published):
    """Follow a training that publishes `log`, and ends with `error` if there is one."""
    with MlflowFollower(uri, work):
        publish(work, log, **published)
        if error:
            raise error


def runs(uri, experiment="small"):
    client = mlflow_client.new_client(uri)
    found = client.get_experiment_by_name(experiment)
    return client.search_runs([found.experiment_id]) if found else []


def only_run(uri):
    (run,) = runs(uri)
    return run


def points(uri, name):
    """Return [(step, value)] of a metric of the only run."""
    client = mlflow_client.new_client(uri)
    history = client.get_metric_history(only_run(uri).info.run_id, name)
    return [(m.step, m.value) for m in sorted(history, key=lambda m: m.step)]


def logged(caplog):
    """Return the messages of our own modules."""
    return [each.getMessage() for each in caplog.records if each.name.startswith("dpnet")]


def wait_for(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_running_training_is_visible_in_mlflow(store, uri):
    work = work_in(store)
    with MlflowFollower(uri, work):
        publish(work, LOG[:2])
        wait_for(lambda: runs(uri) and points(uri, "losses.hole") == [(25, 0.3)])
        assert only_run(uri).info.status == "RUNNING"
        publish(work, LOG[:3])
        wait_for(lambda: points(uri, "losses.hole") == [(25, 0.3), (50, 0.2)])


def test_every_point_is_there_once_at_its_step(store, uri):
    track(uri, work_in(store), LOG)
    assert points(uri, "losses.hole") == [(25, 0.3), (50, 0.2), (75, 0.1)]
    assert points(uri, "gradients.all") == [(25, 1.5), (50, 1.5), (75, 1.5)]
    assert points(uri, "validation.hole_psnr") == [(0, 10.0), (50, 12.0), (75, 13.0)]
    assert points(uri, "validation.mean_fill_psnr")[0] == (0, 9.0)
    assert points(uri, "validation.smooth_fill_psnr") == [(50, 11.0), (75, 11.0)]
    assert points(uri, "gpu_memory_gb") == [(50, 7.5)]


def test_throughput_and_the_parts_of_the_step_time_are_logged(store, uri):
    track(uri, work_in(store), LOG)
    figures = only_run(uri).data.metrics
    assert figures["throughput.images_per_second"] == 10.0
    assert figures["throughput.data_wait_share"] == 0.2
    seconds = {name: figures[f"seconds_per_step.{name}"] for name in ("step", "data", "other")}
    assert seconds == pytest.approx({"step": 4 / 25, "data": 1 / 25, "other": 0.1})
    assert (figures["skipped.steps"], figures["skipped.samples"]) == (0, 3)


def test_the_run_has_the_settings_and_is_found_by_the_digest(store, uri):
    work = work_in(store)
    track(uri, work, LOG)
    data = only_run(uri).data
    assert data.params == {"train.steps": "75", "train.batch_size": "2"}
    assert data.tags["train_digest"] == work.request.digest
    assert data.tags["train"] == f"{store.uri}/{work.folder}"


def test_a_resumed_training_continues_its_run_without_a_point_twice(store, uri):
    work = work_in(store)
    with pytest.raises(KeyboardInterrupt):
        track(uri, work, LOG[:4], KeyboardInterrupt())
    with MlflowFollower(uri, work):
        publish(work, LOG[:2])  # the checkpoint's log: later steps are repeated
        publish(work, [*LOG[:2], trained(30), trained(50, 0.2)])
        publish(work, [*LOG[:2], trained(30), *LOG[2:]])
    assert points(uri, "losses.hole") == [(25, 0.3), (50, 0.2), (75, 0.1)]
    assert points(uri, "validation.hole_psnr") == [(0, 10.0), (50, 12.0), (75, 13.0)]
    assert only_run(uri).info.status == "FINISHED"


def test_a_point_whose_answer_was_lost_is_not_logged_again(store, uri, monkeypatch, caplog):
    client_of = mlflow_client.new_client
    lost = []

    def new_client(uri):
        client = client_of(uri)
        log_batch = client.log_batch

        def losing(run_id, metrics=(), **more):
            log_batch(run_id, metrics=metrics, **more)
            if metrics and not lost:
                lost.append(metrics)
                raise ConnectionError("the answer got lost")

        client.log_batch = losing
        return client

    monkeypatch.setattr(tracking, "new_client", new_client)
    work = work_in(store)
    with MlflowFollower(uri, work):
        publish(work, LOG)
        wait_for(lambda: lost)
    assert len(points(uri, "losses.hole")) == 3
    assert only_run(uri).info.status == "FINISHED"
    assert caplog.text.count("the answer got lost") == 1


@pytest.mark.parametrize(
    ("error", "status"),
    [(None, "FINISHED"), (PipelineError("no"), "FAILED"), (KeyboardInterrupt(), "KILLED")],
)
def test_the_status_says_how_training_ended(store, uri, error, status):
    with pytest.raises(type(error)) if error else nullcontext():
        track(uri, work_in(store), LOG, error)
    assert only_run(uri).info.status == status


def test_a_training_that_does_not_begin_creates_no_run(store, uri):
    with pytest.raises(PipelineError), MlflowFollower(uri, work_in(store)):
        raise PipelineError("no cluster")
    assert runs(uri) == []


def test_validation_images_become_artifacts(store, uri, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    work = work_in(store)
    track(uri, work, LOG[:4], pictures=[50])
    track(uri, work, LOG, pictures=[75])
    client, run = mlflow_client.new_client(uri), only_run(uri)
    there = client.list_artifacts(run.info.run_id, "pictures")
    assert [f.path for f in there] == [f"pictures/step-000000{step}.png" for step in (50, 75)]
    got = client.download_artifacts(run.info.run_id, there[0].path, str(tmp_path))
    assert Path(got).read_bytes() == b"png of step 50"
    assert run.info.artifact_uri.startswith(f"{store.uri}/mlflow-artifacts/")
    assert list((tmp_path / "here").iterdir()) == []


def test_validation_images_of_a_root_on_s3_are_stored_at_aws_endpoint_url(
    moto_root, uri, caplog, capsys
):
    work = work_in(open_store(moto_root))
    track(uri, work, LOG, pictures=[75])
    artifacts = only_run(uri).info.artifact_uri.removeprefix(f"{moto_root}/")
    assert work.store.read(f"{artifacts}/pictures/step-00000075.png") == b"png of step 75"
    assert logged(caplog) == []
    assert capsys.readouterr().err == ""


def test_validation_images_that_cannot_be_stored_cause_one_warning(store, uri, caplog):
    store.write("mlflow-artifacts", b"a file in the way")
    work = work_in(store)
    with MlflowFollower(uri, work):
        publish(work, LOG[:4], pictures=[50])
        wait_for(lambda: runs(uri) and len(points(uri, "losses.hole")) == 2)
        publish(work, LOG, pictures=[75])
    assert only_run(uri).info.status == "FINISHED"
    assert len(points(uri, "losses.hole")) == 3
    assert caplog.text.count("does not take the validation images") == 1


@contextmanager
def mute_server():
    """Run a server that accepts connections and never answers. Yield its port."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(8)
        yield server.getsockname()[1]


def test_a_missing_server_causes_one_warning_and_no_delay(store, caplog):
    work = work_in(store)
    with MlflowFollower("http://me:secret@127.0.0.1:9", work):
        publish(work, LOG[:2])
        time.sleep(0.5)
        publish(work, LOG)
        ended = time.monotonic()
    assert time.monotonic() - ended < 2
    (line,) = logged(caplog)
    assert line.startswith("MLflow at http://127.0.0.1:9 does not take the log")
    assert "secret" not in line


def test_training_does_not_wait_for_a_server_that_never_answers(store, monkeypatch, caplog):
    monkeypatch.setattr(tracking, "FLUSH_S", 0.2)
    monkeypatch.setitem(tracking._PATIENCE, "MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    with mute_server() as port:
        with MlflowFollower(f"http://127.0.0.1:{port}", work_in(store)) as tracker:
            publish(tracker._work, LOG)
            ended = time.monotonic()
        assert time.monotonic() - ended < 1
        assert "needs more than" in caplog.text
        tracker._thread.join(10)


def test_records_that_a_server_missed_are_added_later(store, uri, monkeypatch, caplog):
    client_of = mlflow_client.new_client
    away = [True, True]

    def new_client(uri):
        if away:
            away.pop()
            raise ConnectionError("no server")
        return client_of(uri)

    monkeypatch.setattr(tracking, "new_client", new_client)
    work = work_in(store)
    with MlflowFollower(uri, work):
        publish(work, LOG)
        wait_for(lambda: runs(uri))
    assert len(points(uri, "losses.hole")) == 3
    assert caplog.text.count("no server") == 1


def test_without_mlflow_nothing_is_tracked(store, uri):
    track(None, work_in(store), LOG)
    assert runs(uri) == []


def test_the_same_training_in_two_roots_has_two_runs(store, uri, tmp_path):
    track(uri, work_in(store), LOG)
    track(uri, work_in(LocalStore(tmp_path / "other")), LOG)
    places = [
        (experiment.artifact_location, run.data.tags["train"])
        for experiment in mlflow_client.new_client(uri).search_experiments()
        for run in runs(uri, experiment.name)
    ]
    tops = [store.folder.as_uri(), (tmp_path / "other").as_uri()]
    folder = work_in(store).folder
    assert sorted(places) == sorted((f"{t}/mlflow-artifacts", f"{t}/{folder}") for t in tops)


def files_in(folder):
    return sorted(path for path in folder.rglob("*") if path.suffix != ".db")


def test_a_copied_root_writes_nothing_into_the_old_one(store, uri, tmp_path):
    track(uri, work_in(store), LOG[:4], pictures=[50])
    shutil.copytree(store.folder, tmp_path / "copy")
    before = files_in(store.folder)
    copy = LocalStore(tmp_path / "copy")
    its = f"sqlite:///{copy.folder}/mlflow.db"
    track(its, work_in(copy), LOG, pictures=[75])
    assert files_in(store.folder) == before
    found = (copy.folder / "mlflow-artifacts").rglob("step-00000075.png")
    assert [path.read_bytes() for path in found] == [b"png of step 75"]
    track(its, work_in(copy), LOG)  # the same run again
    experiments = mlflow_client.new_client(its).search_experiments()
    assert [len(runs(its, each.name)) for each in experiments if each.name != "Default"] == [1, 1]


def test_an_experiment_deleted_in_mlflow_is_restored(store, uri, caplog):
    track(uri, work_in(store), LOG[:4])
    client = mlflow_client.new_client(uri)
    client.delete_experiment(client.get_experiment_by_name("small").experiment_id)
    track(uri, work_in(store), LOG)
    assert len(points(uri, "losses.hole")) == 3
    assert caplog.text.count("The experiment small was deleted in MLflow: it is restored") == 1


def registered(store, log):
    """Commit the training, evaluate it and register it."""
    text = b"".join(json.dumps(record).encode() + b"\n" for record in log)
    run = small_root.commit(store, "train", "runs", {"log.jsonl": text}, settings=SETTINGS)
    summary = {"hole_psnr": 20.0, "pairs_digest": "p" * 64}
    summary["figures"] = {"mean_over_bins": {"dpnet": {"hole_psnr": 20.0, "ssim": None}}}
    files = {"report.json": b"{}"}
    evaluation = small_root.commit(
        store, "evaluate", "evaluations", files, inputs={"run": run}, summary=summary
    )
    register(RegisterSettings(promote="always"), run, evaluation, store)


def test_registration_adds_the_evaluation_to_the_run_of_the_training(store, uri):
    track(uri, work_in(store), LOG)
    before = only_run(uri)
    registered(store, LOG)
    run = only_run(uri)
    version = mlflow_client.new_client(uri).get_model_version("dpnet", "1")
    assert version.run_id == run.info.run_id == before.info.run_id
    assert run.data.metrics["mean_over_bins.dpnet.hole_psnr"] == 20.0
    assert run.data.tags["evaluate"].startswith(f"{store.uri}/evaluations/")
    assert run.info.end_time == before.info.end_time
    assert len(points(uri, "losses.hole")) == 3


def test_registration_adds_records_that_are_missing(store, uri):
    with pytest.raises(KeyboardInterrupt):
        track(uri, work_in(store), LOG[:2], KeyboardInterrupt())
    registered(store, LOG)
    assert points(uri, "losses.hole") == [(25, 0.3), (50, 0.2), (75, 0.1)]
    assert only_run(uri).info.status == "FINISHED"
