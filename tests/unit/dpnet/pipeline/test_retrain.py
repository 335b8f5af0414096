"""Retraining: which champion it starts from and is compared with, and that it runs once.

Images, masks, registration and registry are real. Training and evaluation only return figures.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import small_root
from image_sets import photograph, photographs
from lease_thief import leases, steal

from data_prep.core.errors import LeaseLostError, PipelineError
from data_prep.core.manifest import StageRef, read_manifest
from data_prep.core.storage.local import LocalStore
from dpnet.evaluation.stage import evaluate
from dpnet.model_store.records import find_record
from dpnet.pipeline.chain import run_chain
from dpnet.pipeline.config import Config, config_of_source
from dpnet.pipeline.retrain import NothingToDo, retrain, retrain_request
from dpnet.pipeline.verify import verify
from dpnet.registry.settings import RegisterSettings
from dpnet.registry.stage import register
from dpnet.training.stage import train

OPTIONS = ("size=32", "masks.size=32", "masks.train=4", "masks.eval_per_bin=2")


class Stages:
    """A `call` with a fake training and a fake evaluation.

    `psnr` is the figure of every new training. `trained` has the references that trainings started
    from.
    """

    def __init__(self, store: LocalStore, psnr: float) -> None:
        self.store, self.psnr = store, psnr
        self.trained: list[str | None] = []
        self.evaluated: list[tuple[str, str]] = []  # images' digest, run's folder
        self.before: Callable[[str], None] = lambda title: None

    def __call__(self, title: str, stage: Callable[..., StageRef], *arguments: Any) -> StageRef:
        self.before(title)
        if stage is train:
            return self._train(*arguments)
        if stage is evaluate:
            return self._evaluate(*arguments)
        return stage(*arguments)

    def _train(self, training: Any, launch: Any, tracking: Any, store: Any) -> StageRef:
        assert store is self.store
        self.trained.append(training.settings.init_from)
        return small_root.commit(
            store,
            "train",
            "runs",
            {"model/generator.safetensors": f"{self.psnr}".encode(), "model/model.json": b"{}"},
            settings={
                "model": training.model.model_dump(),
                "init": training.settings.init_from,
                "name": training.name,
            },
            inputs={"images": training.images, "masks": training.masks},
        )

    def _evaluate(self, settings: Any, images: Any, masks: Any, run: Any, store: Any) -> StageRef:
        self.evaluated.append((images.content_digest, run.folder))
        own = float(store.read(f"{run.folder}/model/generator.safetensors"))
        pairs = images.content_digest
        # The figure depends on the images.
        psnr = own + int(pairs[:2], 16) / 1000
        return small_root.commit(
            store,
            "evaluate",
            "evaluations",
            {"report.json": f"{psnr} {pairs}".encode(), "metrics.parquet": small_root.table(psnr)},
            inputs={"images": images, "masks": masks, "run": run},
            summary={"hole_psnr": psnr, "pairs_digest": pairs, "figures": {}},
        )


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return small_root.new_store(tmp_path / "root")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return photographs(tmp_path / "photos", 12)


def config(folder: Path, *overrides: str) -> Config:
    sets = [o if "." in o else f"images.{o}" for o in (*OPTIONS, *overrides)]
    return config_of_source(str(folder), sets)


@pytest.fixture
def grown(store: LocalStore, folder: Path) -> Path:
    """Return a source with a champion of 20 dB for version 1, and three new photos since then."""
    run_chain(config(folder), store, call=Stages(store, 20.0))
    for number in range(3):
        photograph(folder / f"new {number}.png", 100 + number)
    return folder


def test_a_retrain_starts_from_the_champion_and_the_better_model_is_promoted(
    store: LocalStore, grown: Path
) -> None:
    before = find_record(store)
    call = Stages(store, 21.0)
    ref = retrain(config(grown), store, call)
    assert call.trained == ["models:/dpnet/1"]
    (new_on, new_run), (old_on, old_run) = call.evaluated
    assert new_on == old_on  # both on the new version's images
    assert new_run == find_record(store)["run"]["folder"]
    assert old_run == before["run"]["folder"]
    summary = ref.summary
    assert (summary["version"], summary["promoted"]) == (2, True)
    assert (summary["images"]["version"], summary["images"]["added"]) == (2, 3)
    assert summary["champion"]["version"] == 1
    new, old = summary["hole_psnr"], summary["champion"]["hole_psnr"]
    assert old != before["hole_psnr"]  # it was evaluated again
    assert summary["reason"].startswith(
        f"It is better than version 1: hole PSNR {new - old:+.2f} dB"
    )
    assert find_record(store)["version"] == 2
    assert verify(store).problems == []
    assert verify(store, "models:/dpnet@champion").problems == []


def test_a_worse_model_is_kept_as_challenger(store: LocalStore, grown: Path) -> None:
    ref = retrain(config(grown), store, Stages(store, 19.0))
    assert (ref.summary["version"], ref.summary["promoted"]) == (2, False)
    assert "It is worse than version 1" in ref.summary["reason"]
    assert find_record(store)["version"] == 1


def test_the_same_images_are_trained_on_once(store: LocalStore, grown: Path) -> None:
    first = retrain(config(grown), store, Stages(store, 19.0))
    call = Stages(store, 30.0)
    again = retrain(config(grown), store, call)
    assert again.skipped
    assert again.summary == first.summary
    assert (call.trained, call.evaluated) == ([], [])


def test_two_retrains_at_once_train_once(store: LocalStore, grown: Path) -> None:
    call = Stages(store, 21.0)
    refs: list[StageRef] = []
    together = threading.Barrier(2)

    def run() -> None:
        together.wait(20)
        refs.append(retrain(config(grown), store, call))

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(call.trained) == 1
    assert sorted(ref.skipped for ref in refs) == [False, True]
    assert refs[0].folder == refs[1].folder
    assert find_record(store)["version"] == 2


def test_there_is_nothing_to_do_if_the_champion_was_trained_on_these_images(
    store: LocalStore, grown: Path
) -> None:
    for path in grown.glob("new *.png"):
        path.unlink()
    (grown / "notes.txt").write_text("not an image")
    call = Stages(store, 30.0)
    with pytest.raises(NothingToDo, match="version 1, was trained on exactly these images"):
        retrain(config(grown), store, call)
    assert call.trained == []
    assert not list(store.list("retrains"))


def test_without_a_champion_training_starts_from_random_weights(
    store: LocalStore, folder: Path
) -> None:
    call = Stages(store, 20.0)
    ref = retrain(config(folder), store, call)
    assert call.trained == [None]
    assert len(call.evaluated) == 1
    assert ref.summary["champion"] is None
    assert ref.summary["reason"].startswith("It is better than the mean fill: ")


class Killed(BaseException):
    """Ends a call at a chosen point, like kill -9."""


@pytest.mark.parametrize("title", ["train", "evaluate the champion", "register"])
def test_a_killed_retrain_resumes_from_the_same_champion(
    store: LocalStore, grown: Path, title: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = Stages(store, 21.0)
    monkeypatch.setattr("dpnet.registry.compare.evaluate", call._evaluate)

    def kill(at: str) -> None:
        if at == title:
            raise Killed

    call.before = kill
    with pytest.raises(Killed):
        retrain(config(grown), store, call)
    another = small_root.run_and_evaluation(store, 20.5)
    promote(store, *another)
    call.before = lambda at: None
    ref = retrain(config(grown), store, call)
    assert call.trained[-1] == "models:/dpnet/1"
    assert ref.summary["started_from"] == 1
    assert ref.summary["version"] == 3
    assert verify(store).problems == []


def test_a_retrain_killed_after_its_promotion_makes_no_second_version(
    store: LocalStore, grown: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*arguments: object) -> None:
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr("dpnet.pipeline.retrain._summary", killed)
        with pytest.raises(Killed):
            retrain(config(grown), store, Stages(store, 21.0))
    assert find_record(store)["version"] == 2
    ref = retrain(config(grown), store, Stages(store, 21.0))
    assert not ref.skipped
    assert (ref.summary["version"], ref.summary["promoted"]) == (2, True)
    assert ref.summary["champion"]["version"] == 1


def test_a_retrain_that_lost_its_lease_registers_nothing(store: LocalStore, grown: Path) -> None:
    call, titles = Stages(store, 21.0), list[str]()

    def lose(title: str) -> None:
        titles.append(title)
        if title == "evaluate the champion":
            steal(store, *leases(store, "retrains"))

    call.before = lose
    with pytest.raises(LeaseLostError, match=r"retrains/.* was taken over by another runner"):
        retrain(config(grown), store, call)
    assert titles[-1] == "evaluate the champion"
    assert find_record(store)["version"] == 1


def promote(store: LocalStore, run: StageRef, evaluation: StageRef) -> None:
    """Make another run the champion, whatever its figures are."""
    register(RegisterSettings(promote="always"), run, evaluation, store)


def test_the_new_model_is_compared_with_the_current_champion(
    store: LocalStore, grown: Path
) -> None:
    call = Stages(store, 21.0)

    def promote_another(title: str) -> None:
        if title == "evaluate":
            promote(store, *small_root.run_and_evaluation(store, 22.0))

    call.before = promote_another
    ref = retrain(config(grown), store, call)
    assert ref.summary["started_from"] == 1
    assert ref.summary["champion"]["version"] == 2
    assert (ref.summary["version"], ref.summary["promoted"]) == (3, False)
    assert find_record(store)["version"] == 2


def test_a_champion_replaced_during_its_evaluation_is_evaluated_too(
    store: LocalStore, grown: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = Stages(store, 21.0)
    monkeypatch.setattr("dpnet.registry.compare.evaluate", call._evaluate)

    def promote_another(title: str) -> None:
        if title == "register":
            promote(store, *small_root.run_and_evaluation(store, 22.0))

    call.before = promote_another
    ref = retrain(config(grown), store, call)
    assert not ref.summary["promoted"]
    assert "It is worse than version 2: hole PSNR -1.00 dB" in ref.summary["reason"]
    assert len(call.evaluated) == 3


def test_a_network_that_differs_from_the_champions_is_refused(
    store: LocalStore, grown: Path
) -> None:
    call = Stages(store, 21.0)
    with pytest.raises(PipelineError, match=r"model\.preset base and this config tiny"):
        retrain(config(grown, "model.preset=tiny"), store, call)
    assert call.trained == []


def test_options_that_do_not_change_the_result_do_not_change_the_request(
    store: LocalStore, grown: Path
) -> None:
    retrain(config(grown), store, Stages(store, 21.0))
    same = ("train.workers=2", "train.checkpoint_every=7", "evaluate.threads=1")
    assert retrain(config(grown, *same), store, Stages(store, 21.0)).skipped


def test_weights_of_lpips_are_in_the_request_by_their_hash(
    store: LocalStore, grown: Path, tmp_path: Path
) -> None:
    images = small_root.commit(store, "images", "images/x", {"a": b"a"})
    masks = small_root.commit(store, "masks", "masks/x", {"a": b"b"})
    file = tmp_path / "weights.pth"

    def digest() -> str:
        named = config(grown, f"evaluate.lpips_weights={file}")
        return retrain_request(named, images, masks).digest

    file.write_bytes(b"\x80\x02one")
    one = digest()
    file.write_bytes(b"\x80\x02two")
    assert len({one, digest(), retrain_request(config(grown), images, masks).digest}) == 3


@pytest.mark.parametrize(
    "altered", [b"{", b"[]", b"3", b"{}", b'{"champion": 1}', b'{"champion": {"version": 1}}']
)
def test_an_altered_plan_is_refused(altered: bytes, store: LocalStore, grown: Path) -> None:
    call = Stages(store, 21.0)

    def spoil(title: str) -> None:
        if title == "train":
            (key,) = (e.key for e in store.list("retrains") if e.key.endswith("plan.json"))
            store.write(key, altered)
            raise Killed

    call.before = spoil
    with pytest.raises(Killed):
        retrain(config(grown), store, call)
    with pytest.raises(PipelineError, match=r"plan\.json was altered: it does not say which"):
        retrain(config(grown), store, Stages(store, 21.0))


def test_a_retrain_starts_from_the_champion_even_if_its_record_was_lost(
    store: LocalStore, grown: Path
) -> None:
    store.delete("registry/dpnet/champion.json")
    call = Stages(store, 10.0)
    ref = retrain(config(grown), store, call)
    assert call.trained == ["models:/dpnet/1"]
    assert not ref.summary["promoted"]
    assert find_record(store)["version"] == 1


def test_the_record_names_the_folder_of_every_output(store: LocalStore, grown: Path) -> None:
    ref = retrain(config(grown), store, Stages(store, 21.0))
    assert set(read_manifest(store, ref.folder).inputs) == {"images", "masks"}
    made = json.loads(store.read(f"{ref.folder}/retrain.json"))["made"]
    stages = {role: read_manifest(store, place).stage for role, place in made.items()}
    assert stages == {
        "run": "train",
        "evaluation": "evaluate",
        "against": "evaluate",
        "register": "register",
    }
