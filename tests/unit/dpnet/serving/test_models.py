"""The models of a server: they follow a promotion, and the old one stays if the new one fails."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import small_root

from data_prep.core.errors import ConfigError, PipelineError
from data_prep.core.storage.local import LocalStore
from dpnet.model_store import packaged
from dpnet.registry.promotion import promote
from dpnet.serving.limits import RequestError
from dpnet.serving.models import LOOK_S, Models, OneModel, Registry, Version, open_source
from dpnet.serving.votes import Votes


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a root with two versions; version 1 is champion."""
    folder = tmp_path_factory.mktemp("root")
    small_root.two_versions(LocalStore(folder))
    return folder


@pytest.fixture
def root(whole: Path, tmp_path: Path) -> Path:
    """Return a copy of the root with two versions."""
    import shutil

    return Path(shutil.copytree(whole, tmp_path / "root"))


class Clock:
    """A clock that goes on only by hand."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Loads:
    """Remembers which versions were loaded; the files of some are gone."""

    def __init__(self) -> None:
        self.ids: list[str] = []
        self.gone: set[str] = set()

    def __call__(self, version: Version) -> Any:
        if version.id in self.gone:
            raise PipelineError(f"the files of {version.name} are missing: restore them.")
        self.ids.append(version.id)
        return version.id


def models_of(root: Path, reference: str = "") -> tuple[Models, Loads, Clock]:
    loads, clock = Loads(), Clock()
    return Models(open_source(str(root), reference), load=loads, clock=clock), loads, clock


def test_the_champion_answers_and_after_a_promotion_the_new_one(root: Path) -> None:
    models, loads, clock = models_of(root)
    assert models.get().version.id == "dpnet@1"
    promote(LocalStore(root), "dpnet", 2, "better")
    assert models.get().version.id == "dpnet@1"  # looked at less than a second ago
    clock.now += LOOK_S
    assert models.get().version.id == "dpnet@2"
    assert models.get("champion").version.name == "dpnet version 2"
    assert loads.ids == ["dpnet@1", "dpnet@2"]
    assert models.health() == (models.get().version, "")


def test_the_champion_is_read_once_a_second_and_not_for_each_request(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models, _, clock = models_of(root)
    looks: list[int] = []
    find = models.source.default
    monkeypatch.setattr(models.source, "default", lambda: looks.append(1) or find())
    for _ in range(50):
        models.get()
        models.health()
    assert len(looks) == 1
    clock.now += LOOK_S
    models.get()
    assert len(looks) == 2


def test_a_champion_that_cannot_be_loaded_leaves_the_old_one_and_health_says_why(
    root: Path,
) -> None:
    models, loads, clock = models_of(root)
    models.get()
    loads.gone = {"dpnet@2"}
    promote(LocalStore(root), "dpnet", 2, "better")
    clock.now += LOOK_S
    assert models.get().version.id == "dpnet@1"
    version, problem = models.health()
    assert version is not None
    assert (version.id, problem) == (
        "dpnet@1",
        "the files of dpnet version 2 are missing: restore them.",
    )
    loads.gone = set()
    clock.now += LOOK_S
    assert models.get().version.id == "dpnet@2"
    assert models.health()[1] == ""


def test_a_root_that_cannot_be_read_leaves_the_old_champion(root: Path) -> None:
    models, _, clock = models_of(root)
    models.get()
    file = root / "registry/dpnet/champion.json"
    whole = file.read_bytes()
    file.write_bytes(b"{")
    clock.now += LOOK_S
    assert models.get().version.id == "dpnet@1"
    assert "was altered" in models.health()[1]
    file.write_bytes(whole)
    clock.now += LOOK_S
    assert models.get().version.id == "dpnet@1"
    assert models.health()[1] == ""


def test_without_a_champion_the_answer_says_what_to_do_until_there_is_one(tmp_path: Path) -> None:
    models, _, clock = models_of(tmp_path)
    with pytest.raises(RequestError, match="run the pipeline there first") as error:
        models.get()
    assert error.value.status == 503
    assert models.health()[0] is None
    versions, problem = models.listed()
    assert (versions, "run the pipeline there first" in problem) == ([], True)
    small_root.champion(LocalStore(tmp_path))
    clock.now += LOOK_S
    assert models.get().version.id == "dpnet@1"


def test_the_first_look_is_known_to_everybody_after_it(tmp_path: Path) -> None:
    models, _, _ = models_of(tmp_path)
    assert models.problem == ""
    assert models.look() is None
    assert "run the pipeline there first" in models.problem


def test_two_versions_are_in_memory_and_the_champion_is_not_forgotten(root: Path) -> None:
    small_root.another_version(LocalStore(root), seed=3)
    models, loads, _ = models_of(root)
    for id in ("", "dpnet@2", "", "dpnet@3", "", "dpnet@2", "dpnet@2", ""):
        models.get(id)
    assert loads.ids == ["dpnet@1", "dpnet@2", "dpnet@3", "dpnet@2"]


@pytest.mark.parametrize("id", ["dpnet@9", "other@1", "dpnet@", "dpnet@../1", "dpnet", "x" * 300])
def test_an_id_that_is_not_listed_is_refused_and_never_a_path(root: Path, id: str) -> None:
    models, loads, _ = models_of(root)
    with pytest.raises(RequestError, match="choose one of the ids") as error:
        models.get(id)
    assert error.value.status == 404
    assert loads.ids == []


def test_the_versions_are_listed_newest_first(root: Path) -> None:
    models, _, _ = models_of(root)
    assert models.listed()[1] == ""  # while the first is loaded
    models.get()
    found, problem = models.listed()
    assert problem == ""
    assert [each["id"] for each in found] == ["dpnet@2", "dpnet@1"]
    assert [each["champion"] for each in found] == [False, True]
    assert [each["state"] for each in found] == ["challenger", "champion"]
    assert all(len(each["digest"]) == 64 for each in found)


def test_versions_that_cannot_be_read_again_are_still_listed_with_the_reason(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models, _, _ = models_of(root)
    models.get()
    before, _ = models.listed()

    def fail() -> list[dict[str, Any]]:
        raise OSError("the disk is gone")

    monkeypatch.setattr(models.source, "facts", fail)
    assert models.listed() == (
        before,
        "the model's files cannot be read (the disk is gone): check the storage.",
    )


def test_a_named_version_does_not_follow_promotions(root: Path) -> None:
    models, _, clock = models_of(root, "models:/dpnet/1")
    promote(LocalStore(root), "dpnet", 2, "better")
    clock.now += LOOK_S
    assert models.get().version.id == "dpnet@1"
    assert not models.source.follows


def test_a_folder_is_a_model_without_versions_and_votes(root: Path) -> None:
    run = min((root / "runs").iterdir())
    source = open_source(str(root), str(run))
    assert isinstance(source, OneModel)
    version = source.default()
    assert version.id == f"model@{version.digest[:12]}"
    assert source.find(version.id) == version
    assert "keeps no votes" in Votes(source).why_not()


@pytest.mark.parametrize("reference", ["none", "models:/none/1", "models:/dpnet/9"])
def test_a_model_that_does_not_exist_is_reported_before_anything_starts(
    root: Path, reference: str
) -> None:
    with pytest.raises(ConfigError):
        open_source(str(root), reference)


def exported(root: Path, folder: Path) -> None:
    """Write the champion of a root as an exported model."""
    from dpnet.model_store.layout import EXPORTED
    from dpnet.model_store.weights import load_generator, save_generator

    store = LocalStore(root)
    run = Registry(store).default().folder
    save_generator(LocalStore(folder.parent), folder.name, load_generator(store, run), {}, EXPORTED)


def test_packaged_weights_answer_where_no_root_is_given_and_none_is_found(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dpnet.model_store.find_model import PACKAGED, find_model

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DPNET_ROOT", raising=False)
    monkeypatch.setattr(packaged, "_FOLDER", tmp_path / "none")
    with pytest.raises(ConfigError, match="dpnet-demo does not exist"):
        open_source(None, "")
    (tmp_path / "dpnet-demo").mkdir()
    (tmp_path / "empty").mkdir()
    assert isinstance(open_source(None, ""), Registry)  # no weights: it waits for a champion
    exported(root, tmp_path / "weights")
    monkeypatch.setattr(packaged, "_FOLDER", tmp_path / "weights")
    source = open_source(None, "")
    assert source.default().name == PACKAGED == find_model("", None)[2]
    assert source.default().id.startswith("packaged@")
    for given in (str(tmp_path / "empty"), str(root)):
        assert isinstance(open_source(given, ""), Registry)
    monkeypatch.setenv("DPNET_ROOT", str(root))
    assert open_source(None, "").default().name == "dpnet version 1"
