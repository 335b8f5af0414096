"""The history of champions: promotions, rollbacks, interruptions, damage, and MLflow."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import small_root

from data_prep.core.errors import PipelineError
from data_prep.core.storage.local import LocalStore
from dpnet.cli.main import main
from dpnet.model_store.history import find_champion, read_history, whole_history
from dpnet.model_store.records import find_record, read_records, registration_folder
from dpnet.pipeline.verify import verify
from dpnet.registry import promotion
from dpnet.registry.compare import champion_figures
from dpnet.registry.promotion import promote, rollback
from dpnet.registry.rebuild import rebuild
from dpnet.registry.settings import RegisterSettings
from dpnet.registry.stage import register
from dpnet.tracking import mlflow_client

MODEL = "dpnet"
CHAMPION = "registry/dpnet/champion.json"


def registered(store: LocalStore, psnr: float, **settings: Any) -> int:
    run, evaluation = small_root.run_and_evaluation(store, psnr)
    given = RegisterSettings.model_validate(settings)
    return int(register(given, run, evaluation, store).summary["version"])


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a root with the versions 1 and 2, both promoted by the gate, and the challenger 3."""
    store = small_root.new_store(tmp_path_factory.mktemp("three") / "root")
    for psnr in (20.0, 21.0, 19.0):
        registered(store, psnr)
    return store.folder


@pytest.fixture
def store(three: Path, tmp_path: Path) -> LocalStore:
    shutil.copytree(three, tmp_path / "root")
    return LocalStore(tmp_path / "root")


@pytest.fixture(autouse=True)
def own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no variable that a command sets reach the next test."""
    monkeypatch.setattr(os, "environ", os.environ.copy())


def champions(store: LocalStore) -> list[tuple[int, str]]:
    return [(entry.version, entry.how) for entry in read_history(store, MODEL)]


def in_mlflow(store: LocalStore) -> tuple[set[int], dict[str, int]]:
    with mlflow_client.connect(f"sqlite:///{store.folder}/mlflow.db") as client:
        versions = {int(v.version) for v in client.search_model_versions(f"name='{MODEL}'")}
        aliases = client.get_registered_model(MODEL).aliases
    return versions, {alias: int(version) for alias, version in aliases.items()}


def move_alias(store: LocalStore, version: int) -> None:
    with mlflow_client.connect(f"sqlite:///{store.folder}/mlflow.db") as client:
        client.set_registered_model_alias(MODEL, "champion", str(version))


def is_sound(store: LocalStore) -> None:
    assert verify(store).problems == []
    assert verify(store).notes == []
    head = read_history(store, MODEL)[-1]
    assert store.read(CHAMPION) == store.read(f"registry/dpnet/v{head.version}.json")


def test_the_gates_promotions_are_in_the_history(store: LocalStore) -> None:
    assert champions(store) == [(1, "gate"), (2, "gate")]
    first, second = read_history(store, MODEL)
    assert (first.former, second.former) == (None, 1)
    assert second.before == first.digest
    assert second.by == "gate"
    assert second.why == find_record(store)["reason"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", second.at)
    record = find_record(store)
    assert second.made_from["run"] == {**record["run"], "name": "small"}
    assert second.made_from["evaluation"] == record["evaluation"]
    is_sound(store)


def test_a_version_is_promoted_by_hand_with_its_reason(store: LocalStore) -> None:
    done = promote(store, MODEL, 3, "It looks better.")
    assert done.changed
    assert find_record(store)["version"] == 3
    entry = read_history(store, MODEL)[-1]
    assert (entry.version, entry.former, entry.how) == (3, 2, "promote")
    assert (entry.why, entry.by) == ("It looks better.", promotion.person())
    is_sound(store)


def test_promoting_the_champion_changes_nothing(store: LocalStore) -> None:
    assert not promote(store, MODEL, 2, "again").changed
    assert champions(store) == [(1, "gate"), (2, "gate")]


def test_each_rollback_goes_one_champion_further_back(store: LocalStore) -> None:
    promote(store, MODEL, 3, "try it")
    assert rollback(store, MODEL).entry.version == 2
    assert read_history(store, MODEL)[-1].why == "Rolled back from version 3."
    assert rollback(store, MODEL, "worse too").entry.version == 1
    assert find_record(store)["version"] == 1
    with pytest.raises(PipelineError, match="version 1 is the first champion, so there is no"):
        rollback(store, MODEL)
    assert champions(store)[2:] == [(3, "promote"), (2, "rollback"), (1, "rollback")]
    is_sound(store)


def test_a_promotion_after_a_rollback_is_rolled_back_to_the_champion_before_it(
    store: LocalStore,
) -> None:
    rollback(store, MODEL)
    promote(store, MODEL, 3, "better")
    assert rollback(store, MODEL).entry.version == 1


def test_a_version_that_does_not_exist_is_named(store: LocalStore) -> None:
    with pytest.raises(PipelineError, match=r"has no version 7 of dpnet: its versions are 1, 2, 3"):
        promote(store, MODEL, 7, "x")
    assert champions(store) == [(1, "gate"), (2, "gate")]


@pytest.mark.parametrize("gone", ["model/generator.safetensors", "model/model.json"])
def test_a_version_whose_model_is_gone_cannot_become_champion(store: LocalStore, gone: str) -> None:
    store.delete(f"{find_record(store, 'models:/dpnet/1')['run']['folder']}/{gone}")
    with pytest.raises(PipelineError, match="version 1 of dpnet cannot become champion, because"):
        rollback(store, MODEL)
    assert find_record(store)["version"] == 2


class Killed(BaseException):
    """Ends a call at a chosen write, like kill -9."""


class Deadly(LocalStore):
    """A store that ends the process before one of its writes."""

    def __init__(self, folder: Path, kill_at: int) -> None:
        super().__init__(folder)
        self.left, self.keys = kill_at, list[str]()

    def _before(self, key: str) -> None:
        if not key.endswith("lease.json"):
            self.keys.append(key)
            self.left -= 1
            if self.left == 0:
                raise Killed

    def write(self, key: str, data: bytes) -> None:
        self._before(key)
        super().write(key, data)

    def create(self, key: str, data: bytes) -> str | None:
        self._before(key)
        return super().create(key, data)


def _register_better(store: LocalStore) -> object:
    return registered(store, 23.0)


COMMANDS: dict[str, Callable[[LocalStore], object]] = {
    "promote": lambda store: promote(store, MODEL, 3, "why"),
    "rollback": lambda store: rollback(store, MODEL, "why"),
    "register": _register_better,
}


@pytest.mark.parametrize("history", ["history", "no history"])
@pytest.mark.parametrize("command", list(COMMANDS))
def test_a_command_killed_before_any_write_is_finished_by_the_next_one(
    store: LocalStore, tmp_path: Path, command: str, history: str
) -> None:
    small_root.run_and_evaluation(store, 23.0)
    if history == "no history":
        shutil.rmtree(store.folder / "registry/dpnet/history")
    whole = LocalStore(shutil.copytree(store.folder, tmp_path / "whole"))
    COMMANDS[command](whole)
    wanted = champions(whole)
    killed: list[str] = []
    for number in range(1, 20):
        root = shutil.copytree(store.folder, tmp_path / f"{number}")
        deadly = Deadly(root, number)
        try:
            COMMANDS[command](deadly)
        except Killed:
            killed.append(deadly.keys[-1])
        else:
            break
        again = LocalStore(root)
        assert verify(again).ok or command == "register", killed[-1]
        if killed[-1] == CHAMPION and command == "rollback":
            promotion.settle(again, MODEL)  # a second rollback would go one further
        else:
            COMMANDS[command](again)
        assert champions(again) == wanted, killed[-1]
        is_sound(again)
    assert any("/history/" in key for key in killed)
    assert CHAMPION in killed


def test_of_two_promotions_at_once_one_waits(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    real, other = promotion._write_entry, list[threading.Thread]()

    def write(*given: Any) -> None:
        if not other:
            other.append(threading.Thread(target=promote, args=(store, MODEL, 1, "second")))
            other[0].start()
            deadline = time.monotonic() + 60
            while "another runner" not in caplog.text:
                assert time.monotonic() < deadline
                time.sleep(0.01)
        real(*given)

    monkeypatch.setattr(promotion, "_write_entry", write)
    promote(store, MODEL, 3, "first")
    other[0].join(60)
    assert champions(store)[2:] == [(3, "promote"), (1, "promote")]
    is_sound(store)


def test_a_record_of_the_history_is_never_overwritten(store: LocalStore) -> None:
    (_, second) = read_history(store, MODEL)
    promotion._write_entry(store, MODEL, second)  # its own bytes, after a lost answer
    before = store.read("registry/dpnet/history/000002.json")
    other = whole_history(store, MODEL)[0]
    changed = type(other)(**{**vars(other), "number": 2})
    with pytest.raises(PipelineError, match="the champion of dpnet was changed at the same time"):
        promotion._write_entry(store, MODEL, changed)
    assert store.read("registry/dpnet/history/000002.json") == before


FIRST, SECOND = (f"registry/dpnet/history/00000{n}.json" for n in (1, 2))


def _edit(store: LocalStore) -> None:
    found = json.loads(store.read(SECOND))
    store.write(SECOND, json.dumps({**found, "why": "Because."}).encode())


def _forge(store: LocalStore) -> None:
    """Alter the first record, and make its own digest fit."""
    entry = read_history(store, MODEL)[0]
    store.write(FIRST, type(entry)(**{**vars(entry), "why": "Because."}).to_bytes())


DAMAGE: dict[str, tuple[Callable[[LocalStore], object], str, str]] = {
    "edited": (_edit, SECOND, "was altered: it does not fit its digest"),
    "forged": (_forge, SECOND, "was altered: it does not continue the record before it"),
    "missing": (lambda store: store.delete(FIRST), FIRST, "is missing"),
    "empty": (lambda store: store.write(SECOND, b""), SECOND, "was altered: it does not fit"),
    "list": (lambda store: store.write(SECOND, b"[]"), SECOND, "was altered: it does not fit"),
    "deep": (lambda s: s.write(SECOND, b"[" * 10**5), SECOND, "was altered: it does not fit"),
    "exchanged": (lambda s: s.write(SECOND, s.read(FIRST)), SECOND, "was altered: it does not fit"),
    "newer": (
        lambda s: s.write(SECOND, s.read(SECOND).replace(b'"format": 1', b'"format": 9')),
        SECOND,
        "has format 9, this version reads 1",
    ),
}


@pytest.mark.parametrize("name", list(DAMAGE))
def test_an_altered_history_is_named_and_the_champion_stays(store: LocalStore, name: str) -> None:
    damage, where, problem = DAMAGE[name]
    damage(store)
    found = [(each.where, each.problem) for each in verify(store).problems]
    assert [key for key, text in found if problem in text] == [where]
    for change in (COMMANDS["promote"], COMMANDS["rollback"]):
        with pytest.raises(PipelineError, match=re.escape(where)) as caught:
            change(store)
        assert problem in str(caught.value)
        assert str(caught.value).endswith("Until then the champion of dpnet stays as it is.")
    assert find_record(store)["version"] == 2


def test_verify_compares_the_history_with_the_records_of_the_versions(store: LocalStore) -> None:
    record = json.loads(store.read("registry/dpnet/v1.json"))
    store.write("registry/dpnet/v1.json", json.dumps({**record, "hole_psnr": 99.0}).encode())
    problem = f"was altered: it is not the record that {FIRST} names"
    assert ("registry/dpnet/v1.json", problem) in [
        (each.where, each.problem) for each in verify(store).problems
    ]
    store.delete("registry/dpnet/v1.json")
    assert any(f"{FIRST} names it as champion" in each.problem for each in verify(store).problems)


def test_the_first_records_of_an_old_root_are_derived_from_its_versions(store: LocalStore) -> None:
    kept = read_history(store, MODEL)
    shutil.rmtree(store.folder / "registry/dpnet/history")
    before = {entry.key for entry in store.list()}
    derived = whole_history(store, MODEL)
    assert {entry.key for entry in store.list()} == before  # reading writes nothing
    assert verify(store).problems == []
    assert [each.derived for each in derived] == [True, True]
    for one, other in zip(derived, kept, strict=True):
        names = ("number", "version", "former", "how", "why", "by", "record_sha256", "made_from")
        assert [getattr(one, n) for n in names] == [getattr(other, n) for n in names]
        committed = json.loads(
            store.read(f"registry/dpnet/{_digest(store, one.version)}/manifest.json")
        )["created"]
        assert one.at == committed
    promote(store, MODEL, 3, "why")
    assert read_history(store, MODEL)[:2] == derived
    is_sound(store)


def _digest(store: LocalStore, version: int) -> str:
    return str(find_record(store, f"models:/dpnet/{version}")["request_digest"])[:12]


def test_an_old_root_whose_champion_was_replaced_by_hand_keeps_that_champion(
    store: LocalStore,
) -> None:
    shutil.rmtree(store.folder / "registry/dpnet/history")
    store.write(CHAMPION, store.read("registry/dpnet/v1.json"))
    assert registered(store, 20.5) == 4
    assert champions(store) == [(1, "gate"), (2, "gate"), (1, "found"), (4, "gate")]
    is_sound(store)


def test_a_champion_that_was_replaced_by_hand_is_added_to_the_history(store: LocalStore) -> None:
    store.write(CHAMPION, store.read("registry/dpnet/v3.json"))
    (problem,) = verify(store).problems
    assert problem.problem.startswith("names version 3, and the history version 2: it was replaced")
    assert registered(store, 22.0) == 4
    assert champions(store)[2:] == [(3, "found"), (4, "gate")]
    is_sound(store)


def test_a_lost_record_of_the_champion_is_restored_from_its_copy(store: LocalStore) -> None:
    before = store.read("registry/dpnet/v2.json")
    store.delete("registry/dpnet/v2.json")
    rollback(store, MODEL)
    assert store.read("registry/dpnet/v2.json") == before
    is_sound(store)


def test_an_alias_moved_in_mlflow_is_adopted_if_wished(store: LocalStore) -> None:
    move_alias(store, 1)
    assert registered(store, 20.5, mlflow_alias="adopt") == 4
    assert champions(store)[2:] == [(1, "mlflow"), (4, "gate")]
    assert in_mlflow(store)[1]["champion"] == 4
    is_sound(store)


def test_an_alias_that_mlflow_missed_is_not_taken_for_a_moved_one(store: LocalStore) -> None:
    rollback(store, MODEL)  # without MLflow, whose alias still names version 2
    assert registered(store, 19.5, mlflow_alias="adopt") == 4
    assert champions(store)[2:] == [(1, "rollback")]
    assert in_mlflow(store)[1]["champion"] == 1


def test_a_lost_database_is_no_moved_alias(store: LocalStore, tmp_path: Path) -> None:
    rollback(store, MODEL)
    other = LocalStore(shutil.copytree(store.folder, tmp_path / "other"))
    other.write("mlflow.db", small_root.new_database().data)
    assert registered(other, 19.5, mlflow_alias="adopt") == 4
    assert champions(other)[2:] == [(1, "rollback")]
    assert in_mlflow(other)[1] == {"champion": 1, "challenger": 4}


FIELDS = (
    "model", "version", "alias", "reason", "champion_before", "hole_psnr", "pairs_digest",
    "promote", "gate", "request_digest", "run", "evaluation",
)  # fmt: skip


@pytest.mark.parametrize("name", ["v1.json", "v2.json", "champion.json"])
@pytest.mark.parametrize("field", FIELDS)
def test_a_damaged_record_gives_a_result_or_one_sentence(
    store: LocalStore, capsys: pytest.CaptureFixture[str], field: str, name: str
) -> None:
    key = f"registry/dpnet/{name}"
    whole = json.loads(store.read(key))
    damaged = [{k: v for k, v in whole.items() if k != field}]
    damaged += [{**whole, field: value} for value in (None, 3, "x", [], {})]
    _, evaluation = small_root.run_and_evaluation(store, 22.0, pairs="q" * 64)
    for record in damaged:
        store.write(key, json.dumps(record).encode())
        for argv in (["list"], ["show", "1"], ["show", "champion"], ["history"], ["show", "2"]):
            status, found = answer(capsys, store, *argv)
            assert status in (0, 1)
            assert "internal error" not in found.get("error", "")
        champion = find_champion_or_none(store)
        if champion is not None:
            with contextlib.suppress(PipelineError):
                champion_figures(store, champion, evaluation, None)
        with contextlib.suppress(PipelineError):
            promotion.settle(store, MODEL)


def find_champion_or_none(store: LocalStore) -> dict[str, Any] | None:
    with contextlib.suppress(PipelineError):
        return find_champion(store, MODEL)
    return None


# The commands.


def answer(
    capsys: pytest.CaptureFixture[str], store: LocalStore, *argv: str
) -> tuple[int, dict[str, Any]]:
    capsys.readouterr()
    status = main(["registry", *argv, "--root", str(store.folder), "--json"])
    return status, json.loads(capsys.readouterr().out.splitlines()[-1])


def text(capsys: pytest.CaptureFixture[str], store: LocalStore, *argv: str) -> str:
    capsys.readouterr()
    assert main(["registry", *argv, "--root", str(store.folder)]) == 0
    return capsys.readouterr().out


def test_list_shows_every_version_with_its_state(
    store: LocalStore, capsys: pytest.CaptureFixture[str]
) -> None:
    status, found = answer(capsys, store, "list")
    assert status == 0
    states = [(each["version"], each["state"], each["hole_psnr"]) for each in found["versions"]]
    assert states == [
        (1, "former champion", 20.0), (2, "champion", 21.0), (3, "challenger", 19.0)
    ]  # fmt: skip
    assert re.search(r"dpnet +2 +champion +21\.00 dB", text(capsys, store, "list"))


def test_show_has_the_reason_the_digests_and_the_times(
    store: LocalStore, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("2", "champion"):
        status, found = answer(capsys, store, "show", name)
        assert (status, found["version"], found["state"]) == (0, 2, "champion")
    assert found["reason"].startswith("It is better than version 1")
    assert found["gate"]["all"]["hole_psnr"]["low"] == 1.0
    assert [each["to"] for each in found["champion"]] == [None]
    shown = text(capsys, store, "show", "1")
    assert "dpnet version 1, former champion" in shown
    assert f"small {found['made_from']['run']['content_digest'][:12]}" not in shown
    assert "by gate: It is better than the mean fill" in shown


def test_history_says_who_was_champion_from_when_to_when_why_and_from_which_data(
    store: LocalStore, capsys: pytest.CaptureFixture[str]
) -> None:
    promote(store, MODEL, 3, "sharper edges")
    _, found = answer(capsys, store, "history")
    spans = found["history"]
    assert [each["version"] for each in spans] == [1, 2, 3]
    assert [each["to"] for each in spans] == [spans[1]["from"], spans[2]["from"], None]
    assert (spans[2]["by"], spans[2]["why"]) == (promotion.person(), "sharper edges")
    shown = text(capsys, store, "history")
    assert f"to now, by {promotion.person()}" in shown
    assert f"settings    {spans[2]['made_from']['run']['request_digest'][:12]}" in shown


def test_promote_and_rollback_say_who_is_champion_and_set_mlflows_alias(
    store: LocalStore, capsys: pytest.CaptureFixture[str]
) -> None:
    status, found = answer(capsys, store, "promote", "3", "--why", "better")
    assert (status, found["version"], found["former"], found["changed"]) == (0, 3, 2, True)
    assert in_mlflow(store)[1]["champion"] == 3
    assert text(capsys, store, "promote", "3", "--why", "x").startswith(
        "dpnet version 3 is champion already."
    )
    assert text(capsys, store, "rollback").startswith("dpnet version 2 is champion now.")
    assert in_mlflow(store)[1]["champion"] == 2


def test_promote_works_without_mlflow(
    store: LocalStore, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    store.delete("mlflow.db")
    _, found = answer(capsys, store, "promote", "3", "--why", "x")
    assert found["mlflow"] == "There is no MLflow here, so no alias was set."
    assert not store.exists("mlflow.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:hunter2@127.0.0.1:9")
    start = time.monotonic()
    status, found = answer(capsys, store, "rollback")
    assert (status, found["version"]) == (0, 2)
    assert found["mlflow"].startswith("MLflow's alias was not set (MLflow at http://127.0.0.1:9 ")
    assert "hunter2" not in json.dumps(found)
    assert time.monotonic() - start < 5
    assert find_record(store)["version"] == 2


def test_rebuild_makes_an_empty_mlflow_whole_again(
    store: LocalStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rollback(store, MODEL)
    other = LocalStore(shutil.copytree(store.folder, tmp_path / "other"))
    other.write("mlflow.db", small_root.new_database().data)
    for _ in range(2):
        status, found = answer(capsys, other, "rebuild")
        (model,) = found["models"]
        assert (status, model["champion"], model["versions"]) == (0, 1, [1, 2, 3])
    assert in_mlflow(other) == ({1, 2, 3}, {"champion": 1, "challenger": 3})
    with mlflow_client.connect(f"sqlite:///{other.folder}/mlflow.db") as client:
        version = client.get_model_version(MODEL, "2")
        assert client.get_run(version.run_id).data.metrics == {
            "mean_over_bins.dpnet.hole_psnr": 21.0
        }
        assert version.tags["reason"].startswith("It is better than version 1")
        client.delete_model_version_tag(MODEL, "2", "reason")
        answer(capsys, other, "rebuild")
        assert client.get_model_version(MODEL, "2").tags == version.tags


@pytest.mark.parametrize("name", ["README.md", "record.json"])
def test_rebuild_writes_a_missing_file_of_a_registration_again(
    store: LocalStore, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = registration_folder(read_records(store, MODEL)[2])
    before = store.read(f"{folder}/{name}")
    store.delete(f"{folder}/{name}")
    assert f"  written again: {store.label}/{folder}/{name}\n" in text(capsys, store, "rebuild")
    assert store.read(f"{folder}/{name}") == before
    is_sound(store)
    assert answer(capsys, store, "rebuild")[1]["models"][0]["restored"] == []


def test_rebuild_does_not_write_a_model_card_with_other_words(
    store: LocalStore, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = registration_folder(read_records(store, MODEL)[2])
    store.delete(f"{folder}/README.md")
    monkeypatch.setattr("dpnet.registry.rebuild.version_card", lambda facts: "other words")
    assert rebuild(store, MODEL, None)["restored"] == []
    assert not store.exists(f"{folder}/README.md")
    assert f"{folder}/README.md is missing, and cannot be made as it was" in caplog.text


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["show", "9"], "has no version 9 of dpnet: its versions are 1, 2, 3."),
        (["promote", "9", "--why", "x"], "has no version 9 of dpnet: its versions are 1, 2, 3."),
        (["history", "--model", "other"], "has no model 'other': choose one of dpnet."),
        (["list", "--model", "other"], "has no model 'other': choose one of dpnet."),
    ],
)
def test_a_name_that_does_not_exist_is_one_sentence(
    store: LocalStore, capsys: pytest.CaptureFixture[str], argv: list[str], sentence: str
) -> None:
    status, found = answer(capsys, store, *argv)
    assert status == 2
    assert sentence in found["error"]


def test_a_root_without_models_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for argv in (["list"], ["history"], ["rollback"], ["rebuild"]):
        status, found = answer(capsys, LocalStore(tmp_path / "none"), *argv)
        assert (status, "has no registered model: run" in found["error"]) == (2, True)


def test_a_root_without_champion_has_an_empty_history(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = small_root.new_store(tmp_path / "root")
    registered(store, 5.0)
    assert text(capsys, store, "history") == "dpnet has had no champion yet.\n"
    status, found = answer(capsys, store, "show", "champion")
    assert (status, "no version was promoted yet" in found["error"]) == (2, True)
    assert answer(capsys, store, "rollback")[0] == 1
    assert answer(capsys, store, "promote", "1", "--why", "x")[1]["version"] == 1
    is_sound(store)


def test_several_models_are_asked_for_by_name(
    store: LocalStore, capsys: pytest.CaptureFixture[str]
) -> None:
    registered(store, 20.0, model="other")
    assert "name one of dpnet, other with --model" in answer(capsys, store, "history")[1]["error"]
    assert len(answer(capsys, store, "list")[1]["versions"]) == 4
    assert answer(capsys, store, "history", "--model", "other")[1]["history"][0]["version"] == 1


def test_the_commands_that_read_need_no_heavy_library(store: LocalStore) -> None:
    code = "import sys; from dpnet.cli.main import main;"
    code += f" main(['registry', 'history', '--root', {str(store.folder)!r}]); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.splitlines()[-1].split())
    assert not loaded & {"torch", "ray", "prefect", "mlflow", "pyarrow", "numpy", "pydantic"}
