"""The register stage: champion and challenger, interruptions, a lost MLflow database."""

import json
import os
import shutil
import sqlite3
import threading
import time
from types import SimpleNamespace

import pytest
import small_root

from data_prep.core.errors import ConfigError, PipelineError
from data_prep.core.storage.local import LocalStore
from data_prep.core.storage.open import open_store
from dpnet.evaluation.settings import EvaluateSettings
from dpnet.model_store.history import read_history
from dpnet.model_store.records import CHALLENGER, CHAMPION, find_record
from dpnet.pipeline.verify import verify
from dpnet.registry import compare, promotion
from dpnet.registry import mlflow_versions as mlflow_registry
from dpnet.registry import stage as register_module
from dpnet.registry.settings import RegisterSettings
from dpnet.registry.stage import register, tracking_uri
from dpnet.tracking import mlflow_client

DIFFERENCES = {
    "hole_psnr": {"mean": 12.0, "low": 12.0, "high": 12.0},
    "ssim": {"mean": 0.0, "low": 0.0, "high": 0.0},
}


@pytest.fixture
def store(tmp_path):
    return small_root.new_store(tmp_path / "root")


def elsewhere(store, database):
    """Copy the root to another folder, with another MLflow database."""
    # MLflow keeps databases open, so the new one needs another path.
    folder = store.folder.parent / "elsewhere"
    shutil.copytree(store.folder, folder)
    (folder / "mlflow.db").write_bytes(database)
    return LocalStore(folder)


def registered(store, psnr, model="dpnet", **options):
    run, evaluation = small_root.run_and_evaluation(store, psnr, **options)
    return register(RegisterSettings(model=model), run, evaluation, store)


def alias_and_reason(ref):
    return ref.summary["alias"], ref.summary["reason"]


def in_mlflow(store, model="dpnet"):
    """Return {version: request digest} and {alias: version} of MLflow's registry."""
    with mlflow_client.connect(f"sqlite:///{store.folder}/mlflow.db") as client:
        found = client.search_model_versions(f"name='{model}'")
        versions = {int(v.version): v.tags["request_digest"] for v in found}
        aliases = client.get_registered_model(model).aliases
        return versions, {alias: int(version) for alias, version in aliases.items()}


def runs_in_mlflow(store):
    with sqlite3.connect(store.folder / "mlflow.db") as database:
        return database.execute("select count(*) from runs").fetchone()[0]


class Killed(BaseException):
    """Ends a call at a chosen place, like kill -9."""


def killed(*args, **kwargs):
    raise Killed


def killed_at_second_call():
    calls = []

    def settle(*given):
        calls.append(given)
        if len(calls) == 2:  # the first one is before the version is made
            raise Killed
        return promotion.settle(*given)

    return settle


def test_the_first_version_becomes_champion(store):
    ref = registered(store, 20.0)
    assert ref.summary == {
        "model": "dpnet",
        "version": 1,
        "alias": CHAMPION,
        "reason": "It is better than the mean fill: hole PSNR +12.00 dB (+12.00 to +12.00), SSIM"
        " +0.0000 (+0.0000 to +0.0000). No ratio bin is worse.",
        "hole_psnr": 20.0,
        "gate": dict.fromkeys(("all", *small_root.BINS), DIFFERENCES),
    }
    assert in_mlflow(store) == ({1: ref.request_digest}, {CHAMPION: 1})
    record = json.loads(store.read("registry/dpnet/champion.json"))
    assert record == json.loads(store.read("registry/dpnet/v1.json"))
    assert record["run"]["folder"].startswith("runs/")


def test_a_better_model_on_the_same_pairs_becomes_champion(store):
    registered(store, 20.0)
    ref = registered(store, 21.5)
    assert alias_and_reason(ref) == (
        CHAMPION,
        "It is better than version 1: hole PSNR +1.50 dB (+1.50 to +1.50), SSIM +0.0000 (+0.0000 to"
        " +0.0000). No ratio bin is worse.",
    )
    assert in_mlflow(store)[1] == {CHAMPION: 2}
    assert find_record(store)["version"] == 2


def test_a_worse_model_becomes_challenger(store):
    registered(store, 20.0)
    ref = registered(store, 19.0)
    assert alias_and_reason(ref)[0] == CHALLENGER
    assert in_mlflow(store)[1] == {CHAMPION: 1, CHALLENGER: 2}
    assert find_record(store)["version"] == 1


def test_a_new_evaluation_of_a_former_champion_is_ignored(store):
    run, of_former = small_root.run_and_evaluation(store, 20.0)
    register(RegisterSettings(), run, of_former, store)
    registered(store, 21.0)
    run, evaluation = small_root.run_and_evaluation(store, 20.5)
    ref = register(RegisterSettings(), run, evaluation, store, against=of_former)
    assert ref.summary["reason"].startswith("It is worse than version 2: hole PSNR -0.50 dB")
    assert ref.summary["alias"] == CHALLENGER


def test_a_first_version_that_is_no_better_than_the_mean_fill_is_no_champion(store):
    ref = registered(store, small_root.MEAN_FILL)
    assert ref.summary["alias"] == CHALLENGER
    assert ref.summary["reason"].startswith("It is not clearly better than the mean fill: hole")
    assert in_mlflow(store)[1] == {CHALLENGER: 1}
    with pytest.raises(PipelineError, match=r"no champion, because .* models:/dpnet/1, or promote"):
        find_record(store)
    assert registered(store, 20.0).summary["alias"] == CHAMPION
    assert find_record(store)["version"] == 2


def test_a_worse_ssim_keeps_a_model_with_a_higher_psnr_from_the_champion(store):
    registered(store, 20.0)
    ref = registered(store, 21.0, ssim=0.79)
    assert ref.summary["alias"] == CHALLENGER
    assert "SSIM -0.0100" in ref.summary["reason"]


def evaluates(monkeypatch, figures, protocol=None):
    """Let the champion be evaluated again with these figures. Return the calls."""
    calls = []

    def evaluate(settings, images, masks, run, store):
        calls.append((settings, images.folder, masks.folder, run.folder))
        return small_root.commit(
            store,
            "evaluate",
            "evaluations",
            {"metrics.parquet": small_root.table(figures)},
            settings={"again": True},
            inputs={"run": run},
            summary={"hole_psnr": figures, "pairs_digest": "q" * 64, "figures": {}},
        )

    monkeypatch.setattr(compare, "evaluate", evaluate)
    return calls


def on_other_pairs(store, psnr):
    """Commit a run and its evaluation on pairs of new images and masks."""
    run, _ = small_root.run_and_evaluation(store, psnr)
    data = {role: small_root.commit(store, role, role, {role: b"new"}) for role in DATA}
    evaluation = small_root.commit(
        store,
        "evaluate",
        "evaluations",
        {"metrics.parquet": small_root.table(psnr)},
        settings={"split": "val", "seed": 3},
        inputs={"run": run, **data},
        summary={"hole_psnr": psnr, "pairs_digest": "q" * 64, "figures": {}},
    )
    return run, evaluation, data


DATA = ("images", "masks")


@pytest.mark.parametrize(("again", "alias"), [(21.0, CHAMPION), (23.0, CHALLENGER)])
def test_a_champion_of_other_pairs_is_evaluated_again_on_the_new_ones(
    store, monkeypatch, again, alias
):
    champion = find_run(registered(store, 20.0), store)
    calls = evaluates(monkeypatch, again)
    run, evaluation, data = on_other_pairs(store, 22.0)
    measure = EvaluateSettings(split="test", seed=7, lpips_weights="alexnet.pth", threads=3)
    ref = register(RegisterSettings(), run, evaluation, store, measure=measure)
    ((settings, *folders),) = calls
    assert (settings.split, settings.seed) == ("val", 3)  # as the new version's evaluation
    assert (settings.lpips_weights, settings.threads) == ("alexnet.pth", 3)
    assert folders == [data["images"].folder, data["masks"].folder, champion]
    assert ref.summary["alias"] == alias
    assert f"{22 - again:+.2f} dB" in ref.summary["reason"]
    assert "against" in find_record(store, "models:/dpnet/2")
    wrong = [problem.where for problem in verify(store).problems]
    assert not any(where.startswith("registry/") for where in wrong)


def test_a_champion_measured_with_other_definitions_is_evaluated_again(store, monkeypatch):
    registered(store, 20.0)
    run, _ = small_root.run_and_evaluation(store, 22.0)
    data = {role: small_root.commit(store, role, role, {role: b"new"}) for role in DATA}
    options = {"inputs": {"run": run, **data}, "settings": {"protocol": 99}}
    summary = {"hole_psnr": 22.0, "pairs_digest": "p" * 64, "figures": {}}
    files = {"metrics.parquet": small_root.table(22.0)}
    evaluation = small_root.commit(
        store, "evaluate", "evaluations", files, summary=summary, **options
    )
    calls = evaluates(monkeypatch, 21.0)  # by another version of dpnet: its definitions differ
    assert alias_and_reason(register(RegisterSettings(), run, evaluation, store)) == (
        CHALLENGER,
        "The champion, version 1, was evaluated on other pairs: this version's evaluation was made"
        " by another version of dpnet, so evaluate it again.",
    )
    assert len(calls) == 1


def find_run(ref, store):
    return find_record(store, f"models:/dpnet/{ref.summary['version']}")["run"]["folder"]


@pytest.mark.parametrize("gone", ["model/generator.safetensors", "model/model.json"])
def test_a_champion_whose_model_is_gone_keeps_the_new_version_a_challenger(
    store, monkeypatch, gone
):
    champion = find_run(registered(store, 20.0), store)
    calls = evaluates(monkeypatch, 20.0)
    store.delete(f"{champion}/{gone}")
    run, evaluation, _ = on_other_pairs(store, 30.0)
    ref = register(RegisterSettings(), run, evaluation, store)
    assert calls == []
    assert alias_and_reason(ref) == (
        CHALLENGER,
        f"The champion, version 1, was evaluated on other pairs, and its model in {champion} is"
        " gone, so the two cannot be compared.",
    )


def test_a_champion_whose_figures_are_gone_keeps_the_new_version_a_challenger(store):
    registered(store, 20.0)
    folder = find_record(store)["evaluation"]["folder"]
    store.delete(f"{folder}/metrics.parquet")
    assert alias_and_reason(registered(store, 30.0)) == (
        CHALLENGER,
        f"The figures of the champion, version 1, are gone from {folder}, so the two cannot be"
        " compared.",
    )


@pytest.mark.parametrize("damage", [b"", b"PAR1", small_root.table(99.0)])
def test_an_altered_table_of_figures_is_named(store, damage):
    run, evaluation = small_root.run_and_evaluation(store, 20.0)
    store.write(f"{evaluation.folder}/metrics.parquet", damage)
    with pytest.raises(PipelineError, match=r"metrics\.parquet was altered\. Restore it"):
        register(RegisterSettings(), run, evaluation, store)
    store.delete(f"{evaluation.folder}/metrics.parquet")
    with pytest.raises(PipelineError, match=r"metrics\.parquet is missing\. Restore it"):
        register(RegisterSettings(), run, evaluation, store)


def test_promote_always_and_never_do_not_ask_the_gate(store):
    registered(store, 20.0)
    run, evaluation = small_root.run_and_evaluation(store, 10.0, pairs="q" * 64)
    always = register(RegisterSettings(promote="always"), run, evaluation, store)
    assert alias_and_reason(always) == (CHAMPION, "register.promote is always.")
    run, evaluation = small_root.run_and_evaluation(store, 30.0)
    never = register(RegisterSettings(promote="never"), run, evaluation, store)
    assert alias_and_reason(never) == (CHALLENGER, "register.promote is never.")
    assert find_record(store)["version"] == 2


def test_the_default_settings_add_nothing_to_the_digest():
    assert RegisterSettings().requested() == {"model": "dpnet"}
    assert RegisterSettings(mlflow_alias="adopt").requested() == {"model": "dpnet"}
    assert RegisterSettings(promote="never").requested() == {"model": "dpnet", "promote": "never"}


def test_the_reason_and_the_differences_are_tags_in_mlflow(store):
    ref = registered(store, 20.0)
    with mlflow_client.connect(f"sqlite:///{store.folder}/mlflow.db") as client:
        tags = client.get_model_version("dpnet", "1").tags
    assert tags["reason"] == ref.summary["reason"]
    assert json.loads(tags["gate"]) == ref.summary["gate"] == find_record(store)["gate"]


def test_the_same_request_is_skipped(store):
    first = registered(store, 20.0)
    again = registered(store, 20.0)
    assert again.skipped
    assert again.summary == first.summary
    assert set(in_mlflow(store)[0]) == {1}


@pytest.mark.parametrize(
    ("module", "step"),
    [
        (mlflow_registry, "_source"),  # the MLflow run is complete, there is no version yet
        (register_module, "_write_once"),  # there is a version, but no record yet
        (register_module, "write_file"),  # everything is written, the stage is not committed yet
    ],
)
def test_a_killed_registration_creates_no_second_version(store, monkeypatch, module, step):
    with monkeypatch.context() as patched:
        patched.setattr(module, step, killed)
        with pytest.raises(Killed):
            registered(store, 20.0)
    ref = registered(store, 20.0)
    assert (ref.summary["version"], ref.summary["alias"]) == (1, CHAMPION)
    assert in_mlflow(store) == ({1: ref.request_digest}, {CHAMPION: 1})
    assert runs_in_mlflow(store) == 1
    assert find_record(store)["version"] == 1


def test_of_two_registrations_at_once_the_second_is_compared_with_the_first(
    store, monkeypatch, caplog
):
    real, other = mlflow_registry.ensure_version, []

    def ensure(*given):
        if not other:  # the first one, before it makes a version
            other.append(threading.Thread(target=registered, args=(store, 19.0)))
            other[0].start()
            deadline = time.monotonic() + 60
            while "another runner" not in caplog.text and other[0].is_alive():
                assert time.monotonic() < deadline
                time.sleep(0.01)
        return real(*given)

    monkeypatch.setattr(mlflow_registry, "ensure_version", ensure)
    first = registered(store, 20.0)
    other[0].join(60)
    second = registered(store, 19.0)
    assert second.skipped
    assert (first.summary["version"], second.summary["version"]) == (1, 2)
    assert alias_and_reason(first)[0] == CHAMPION
    assert alias_and_reason(second)[0] == CHALLENGER
    assert second.summary["reason"].startswith("It is worse than version 1: hole PSNR -1.00 dB")


def test_a_registration_that_resumes_late_does_not_replace_a_newer_champion(store, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(register_module, "write_file", killed)
        with pytest.raises(Killed):
            registered(store, 20.0)
    registered(store, 25.0)
    assert registered(store, 20.0).summary["version"] == 1
    assert find_record(store)["version"] == 2
    assert [entry.version for entry in read_history(store, "dpnet")] == [1, 2]
    assert in_mlflow(store)[1][CHAMPION] == 2


def test_a_lost_champion_is_still_the_one_to_beat_and_is_restored(store, caplog):
    registered(store, 20.0)
    registered(store, 21.0)
    registered(store, 19.0)
    before = store.read("registry/dpnet/champion.json")
    store.delete("registry/dpnet/champion.json")
    ref = registered(store, 20.5)
    assert ref.summary["reason"].startswith("It is worse than version 2: hole PSNR -0.50 dB")
    assert store.read("registry/dpnet/champion.json") == before
    assert in_mlflow(store)[1] == {CHAMPION: 2, CHALLENGER: 4}
    assert "champion.json was missing: version 2 is champion again" in caplog.text


def test_a_registration_killed_before_its_promotion_is_the_champion_for_the_next(
    store, monkeypatch
):
    with monkeypatch.context() as patched:
        patched.setattr(register_module, "settle", killed_at_second_call())
        with pytest.raises(Killed):
            registered(store, 20.0)
    assert registered(store, 19.0).summary["alias"] == CHALLENGER
    assert registered(store, 20.0).summary["alias"] == CHAMPION
    assert find_record(store)["version"] == 1
    assert store.read("registry/dpnet/champion.json") == store.read("registry/dpnet/v1.json")


def test_a_lost_champion_without_its_record_is_an_error(store):
    registered(store, 20.0)
    registered(store, 19.0)
    store.delete("registry/dpnet/champion.json")
    store.delete("registry/dpnet/v1.json")
    with pytest.raises(PipelineError, match="so is the record of version 1, the champion: restore"):
        registered(store, 22.0)


def test_a_versions_record_is_never_replaced(store):
    register_module._write_once(store, "registry/dpnet/v1.json", {"version": 1})
    register_module._write_once(store, "registry/dpnet/v1.json", {"version": 1})
    before = store.read("registry/dpnet/v1.json")
    with pytest.raises(PipelineError, match="belongs to another registration"):
        register_module._write_once(store, "registry/dpnet/v1.json", {"version": 2})
    assert store.read("registry/dpnet/v1.json") == before


def test_a_lost_database_is_restored_from_storage(store, caplog):
    digests = [registered(store, psnr).request_digest for psnr in (20.0, 21.0)]
    store = elsewhere(store, small_root.new_database().data)
    ref = registered(store, 19.0)
    assert ref.summary["version"] == 3
    versions, aliases = in_mlflow(store)
    assert versions == {1: digests[0], 2: digests[1], 3: ref.request_digest}
    assert aliases == {CHAMPION: 2, CHALLENGER: 3}
    assert "restored from storage" in caplog.text


def test_a_registration_continues_after_its_experiment_was_deleted_in_mlflow(store, caplog):
    registered(store, 20.0)
    with mlflow_client.connect(f"sqlite:///{store.folder}/mlflow.db") as client:
        client.delete_experiment(client.get_experiment_by_name("small").experiment_id)
    assert registered(store, 21.0).summary["version"] == 2
    assert "The experiment small was deleted in MLflow: it is restored" in caplog.text


@pytest.mark.parametrize("deleted", [(1,), (2,), (1, 2), (2, 3), (1, 2, 3)])
def test_versions_deleted_in_mlflow_block_no_registration(store, caplog, deleted):
    digests = [registered(store, psnr).request_digest for psnr in (20.0, 21.0, 19.0)]
    with mlflow_client.connect(f"sqlite:///{store.folder}/mlflow.db") as client:
        for version in deleted:
            client.delete_model_version("dpnet", str(version))
    refs = [registered(store, psnr) for psnr in (20.5, 22.0)]
    assert "worse than version 2" in refs[0].summary["reason"]
    assert refs[1].summary["alias"] == CHAMPION
    versions, aliases = in_mlflow(store)
    ours = {number: digest for number, digest in enumerate(digests, 1) if number not in deleted}
    new = {ref.summary["version"]: ref.request_digest for ref in refs}
    assert versions == {**ours, **new}
    assert aliases == {CHAMPION: refs[1].summary["version"], CHALLENGER: refs[0].summary["version"]}
    names = ", ".join(map(str, deleted))
    assert f"MLflow has no version {names} of dpnet any more" in caplog.text
    assert f"models:/dpnet/{deleted[0]} still works" in caplog.text
    assert find_record(store, f"models:/dpnet/{deleted[0]}")["version"] == deleted[0]


def test_a_lost_database_is_restored_although_numbers_are_missing(store):
    digests = [registered(store, psnr).request_digest for psnr in (20.0, 21.0, 22.0)]
    store.delete("registry/dpnet/v2.json")
    store = elsewhere(store, small_root.new_database().data)
    ref = registered(store, 19.0)
    assert in_mlflow(store)[0] == {1: digests[0], 3: digests[2], 4: ref.request_digest}


def test_a_lost_champion_file_is_restored_although_mlflow_has_no_such_version(store):
    registered(store, 20.0)
    with mlflow_client.connect(f"sqlite:///{store.folder}/mlflow.db") as client:
        client.delete_model_version("dpnet", "1")
    store.delete("registry/dpnet/champion.json")
    assert registered(store, 19.0).summary["alias"] == CHALLENGER
    assert find_record(store)["version"] == 1


def test_a_killed_registration_whose_version_was_deleted_resumes(store, monkeypatch):
    registered(store, 20.0)
    with monkeypatch.context() as patched:
        patched.setattr(register_module, "write_file", killed)
        with pytest.raises(Killed):
            registered(store, 19.0)
    with mlflow_client.connect(f"sqlite:///{store.folder}/mlflow.db") as client:
        client.delete_model_version("dpnet", "2")
    assert alias_and_reason(registered(store, 19.0))[0] == CHALLENGER
    assert in_mlflow(store)[1] == {CHAMPION: 1}


def test_an_alias_moved_in_mlflow_is_named_and_set_back(store, caplog):
    for psnr in (20.0, 21.0):
        registered(store, psnr)
    with mlflow_client.connect(f"sqlite:///{store.folder}/mlflow.db") as client:
        client.set_registered_model_alias("dpnet", CHAMPION, "1")
    assert registered(store, 20.5).summary["alias"] == CHALLENGER
    assert in_mlflow(store)[1] == {CHAMPION: 2, CHALLENGER: 3}
    assert (
        f"MLflow's alias champion of dpnet was moved to version 1. The champion of {store.label} is"
        " still version 2, and MLflow's alias names it again. To promote version 1, run `dpnet"
        " registry promote 1 --model dpnet --why TEXT`, or set register.mlflow_alias to adopt."
    ) in caplog.text


def test_a_database_with_other_versions_is_refused(store, tmp_path):
    registered(store, 20.0)
    other = small_root.new_store(tmp_path / "other")
    registered(other, 22.0)
    store = elsewhere(store, other.read("mlflow.db"))
    with pytest.raises(PipelineError, match=r"version 1 of dpnet .* register\.model"):
        registered(store, 21.0)


def test_models_with_different_names_have_their_own_versions(store):
    registered(store, 20.0)
    assert registered(store, 10.0, model="other").summary["alias"] == CHAMPION
    assert find_record(store, "models:/other@champion")["hole_psnr"] == 10.0
    with pytest.raises(PipelineError, match="several champions"):
        find_record(store)


def test_mlflow_has_the_training_and_its_figures(store):
    ref = registered(store, 20.0)
    with mlflow_client.connect(f"sqlite:///{store.folder}/mlflow.db") as client:
        version = client.get_model_version("dpnet", "1")
        run = client.get_run(version.run_id)
    assert run.data.params["train.steps"] == "5"
    assert run.data.metrics == {"mean_over_bins.dpnet.hole_psnr": 20.0}
    assert run.info.status == "FINISHED"
    record = find_record(store)
    assert version.source == f"{store.uri}/{record['run']['folder']}/model"
    assert version.tags["evaluation_digest"] == record["evaluation"]["content_digest"]
    assert version.tags["request_digest"] == ref.request_digest


def test_the_record_holds_no_times_and_no_local_paths(store):
    registered(store, 20.0)
    text = store.read("registry/dpnet/v1.json").decode()
    assert str(store.folder) not in text
    assert "created" not in text


def test_nothing_is_written_in_the_working_directory(store, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    registered(store, 20.0)
    assert list((tmp_path / "here").iterdir()) == []


def test_a_new_database_is_created_without_output_and_without_other_files():
    made = small_root.new_database()
    assert made.output == ""
    assert made.files == ["mlflow.db"]


def test_a_database_is_complete_or_missing(tmp_path, monkeypatch):
    # MLflow refuses an incomplete database.
    monkeypatch.setattr(os, "link", killed)
    with pytest.raises(Killed), mlflow_client.connect(f"sqlite:///{tmp_path}/new.db"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_root_on_s3_needs_a_tracking_uri(store):
    run, evaluation = small_root.run_and_evaluation(store, 20.0)
    with pytest.raises(ConfigError, match=r"register\.tracking_uri is not set"):
        register(RegisterSettings(), run, evaluation, open_store("s3://bucket/root"))


def test_mlflows_own_environment_variable_is_the_default(store, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow:5000")
    assert tracking_uri(RegisterSettings(), store) == "http://mlflow:5000"
    assert tracking_uri(RegisterSettings(), open_store("s3://bucket/root")) == "http://mlflow:5000"
    set_ = RegisterSettings(tracking_uri="sqlite:////own.db")
    assert tracking_uri(set_, store) == "sqlite:////own.db"
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert tracking_uri(RegisterSettings(), store) == f"sqlite:///{store.folder}/mlflow.db"


def test_a_server_accepts_the_address_of_a_local_model(store):
    # The server takes a plain path for one of its own, and refuses it.
    clients = {uri: SimpleNamespace(tracking_uri=uri) for uri in ("sqlite:///x", "http://x")}
    sources = {u: mlflow_registry._source(c, store, "runs/r") for u, c in clients.items()}
    assert sources["sqlite:///x"] == f"file://{store.folder}/runs/r/model"
    assert sources["http://x"] == f"dpnet-file://{store.folder.resolve()}/runs/r/model"


def test_the_error_for_a_database_names_the_reason(store):
    run, evaluation = small_root.run_and_evaluation(store, 20.0)
    (store.folder / "broken.db").write_bytes(b"not a database" * 100)
    settings = RegisterSettings(tracking_uri=f"sqlite:///{store.folder}/broken.db")
    with pytest.raises(PipelineError, match=r"MLflow at sqlite.* cannot be used"):
        register(settings, run, evaluation, store)


def test_no_error_of_mlflow_shows_the_password_in_its_address(store, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    run, evaluation = small_root.run_and_evaluation(store, 20.0)
    settings = RegisterSettings(tracking_uri="http://me:hunter2@127.0.0.1:9")
    with pytest.raises(PipelineError, match=r"MLflow at http://127\.0\.0\.1:9 ") as caught:
        register(settings, run, evaluation, store)
    assert "hunter2" not in str(caught.value)


def test_a_new_database_can_be_read_only_by_its_user(tmp_path):
    before = os.umask(0)
    try:
        mlflow_client.new_client(f"sqlite:///{tmp_path}/mlflow.db")
    finally:
        os.umask(before)
    assert (tmp_path / "mlflow.db").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("name", ["../up", "a/b", "", ".hidden"])
def test_a_model_name_cannot_leave_the_registry(name):
    with pytest.raises(ValueError, match="model"):
        RegisterSettings(model=name)


def test_an_altered_record_is_an_error(store):
    registered(store, 20.0)
    store.write("registry/dpnet/champion.json", b"{}")
    with pytest.raises(PipelineError, match=r"champion\.json was altered"):
        find_record(store)
