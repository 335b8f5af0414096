"""`dpnet verify`: every missing or altered file, manifest and record is named."""

import json

import pytest
import small_root

from data_prep.core.digest import content_digest
from data_prep.core.errors import PipelineError
from data_prep.core.storage.local import LocalStore
from dpnet.pipeline.verify import verify, verify_uri
from dpnet.registry.settings import RegisterSettings
from dpnet.registry.stage import register


@pytest.fixture
def store(tmp_path):
    return LocalStore(tmp_path / "root")


@pytest.fixture
def chain(store):
    """Commit data → run → evaluation, and other data that no stage uses."""
    files = {"train-000000.tar": b"t" * 100, "train.urls": b"train-000000.tar\n"}
    images = small_root.commit(store, "data", "data/a", files)
    small_root.commit(store, "data", "data/b", {"x.tar": b"x" * 10})
    inputs = {"images": images}
    run = small_root.commit(store, "train", "runs", {"model/w": b"w" * 20}, inputs=inputs)
    inputs = {"run": run}
    evaluation = small_root.commit(store, "evaluate", "evaluations", {"r": b"r"}, inputs=inputs)
    return images, run, evaluation


@pytest.fixture
def registered(tmp_path):
    store = small_root.new_store(tmp_path / "registered")
    run, evaluation = small_root.run_and_evaluation(store, 20.0)
    register(RegisterSettings(), run, evaluation, store)
    return store, run


def problems(result):
    return [(p.where, p.problem) for p in result.problems]


def edit(store, key, **changes):
    """Change fields of a JSON file."""
    store.write(key, json.dumps(json.loads(store.read(key)) | changes).encode())


def test_a_sound_root_has_no_problems(store, chain):
    result = verify(store)
    assert problems(result) == []
    assert result.ok
    assert (result.stages, result.files, result.bytes) == (4, 5, 148)


def test_a_file_with_one_bit_changed_is_named(store, chain):
    key = f"{chain[0].folder}/train-000000.tar"
    store.write(key, b"t" * 99 + b"u")
    assert problems(verify(store)) == [(key, "was altered: another sha256")]


def test_a_file_of_another_size_is_named(store, chain):
    key = f"{chain[0].folder}/train-000000.tar"
    store.write(key, b"t" * 99)
    assert problems(verify(store)) == [(key, "was altered: it has 99 bytes, not 100")]


def test_a_missing_file_is_named(store, chain):
    key = f"{chain[1].folder}/model/w"
    store.delete(key)
    assert problems(verify(store)) == [(key, "is missing")]


def test_a_manifest_that_is_not_json_is_named_and_the_others_are_checked(store, chain):
    store.write(f"{chain[2].folder}/manifest.json", b"not json")
    result = verify(store)
    assert [where for where, _ in problems(result)] == [f"{chain[2].folder}/manifest.json"]
    assert result.stages == 3


def test_a_manifest_with_a_missing_part_is_named(store, chain):
    where = f"{chain[2].folder}/manifest.json"
    manifest = json.loads(store.read(where))
    del manifest["files"]
    store.write(where, json.dumps(manifest).encode())
    ((place, problem),) = problems(verify(store))
    assert place == where
    assert "was altered: it is not a whole manifest" in problem


def test_settings_changed_in_a_manifest_are_noticed(store, chain):
    where = f"{chain[2].folder}/manifest.json"
    edit(store, where, settings={"seed": 7})
    (problem,) = problems(verify(store))
    assert problem[0] == where
    assert "request digest" in problem[1]


def test_a_hash_changed_with_its_file_is_noticed(store, chain):
    where = f"{chain[2].folder}/manifest.json"
    manifest = json.loads(store.read(where))
    manifest["files"][0]["sha256"] = "0" * 64
    store.write(where, json.dumps(manifest).encode())
    assert any(
        "content digest" in text for place, text in problems(verify(store)) if place == where
    )


def test_an_input_with_another_content_digest_is_noticed(store, chain):
    where = f"{chain[0].folder}/manifest.json"
    manifest = json.loads(store.read(where))
    manifest["files"] = manifest["files"][:1]
    pairs = [(f["path"], f["sha256"]) for f in manifest["files"]]
    manifest["content_digest"] = content_digest(pairs)
    store.write(where, json.dumps(manifest).encode())
    assert problems(verify(store)) == [
        (
            f"{chain[1].folder}/manifest.json",
            f"its input 'images', {chain[0].folder}, has another content digest",
        )
    ]


def test_a_missing_input_is_noticed(store, chain):
    store.delete(f"{chain[0].folder}/manifest.json")
    (problem,) = problems(verify(store))
    assert problem[0] == f"{chain[1].folder}/manifest.json"
    assert "its input 'images' does not exist" in problem[1]


def test_a_stage_is_verified_with_all_its_inputs_and_nothing_else(store, chain):
    result = verify(store, chain[2].folder)
    assert (result.stages, result.files) == (3, 4)
    store.write(f"{chain[0].folder}/train.urls", b"")
    assert not verify(store, chain[2].folder).ok


def test_a_path_that_leads_out_of_the_root_is_not_followed(store, chain):
    where = f"{chain[2].folder}/manifest.json"
    record = {"path": "../../../outside", "size": 1, "sha256": "0" * 64, "content": False}
    manifest = json.loads(store.read(where))
    edit(store, where, files=[*manifest["files"], record])
    assert problems(verify(store)) == [
        (where, "was altered: ../../../outside is not inside the root")
    ]


def test_a_folder_without_a_finished_stage_is_refused_with_advice(tmp_path):
    with pytest.raises(PipelineError, match="contains no finished stage: name a root"):
        verify_uri(str(tmp_path))


def test_an_unfinished_stage_is_an_error(store, chain):
    with pytest.raises(PipelineError, match="never finished"):
        verify(store, "data/a/other")


def test_a_root_a_stage_and_a_manifest_can_be_given_by_path_and_uri(store, chain):
    folder = store.folder / chain[2].folder
    assert verify_uri(str(store.folder)).stages == 4
    assert verify_uri(store.uri).stages == 4
    assert verify_uri(str(folder)).stages == 3
    assert verify_uri(f"{folder.as_uri()}/manifest.json").stages == 3


def test_a_moved_stage_is_an_error(store, chain, tmp_path):
    (store.folder / chain[0].folder).rename(tmp_path / "moved")
    with pytest.raises(PipelineError, match="was moved"):
        verify_uri(str(tmp_path / "moved"))


def test_a_registered_model_is_verified_with_its_run_and_data(registered):
    store, run = registered
    for reference in ("models:/dpnet@champion", "models:/dpnet/1"):
        result = verify_uri(reference, str(store.folder))
        assert (result.ok, result.stages, result.records) == (True, 3, 1)
    store.write(f"{run.folder}/model/generator.safetensors", b"21.0")
    result = verify_uri("models:/dpnet@champion", str(store.folder))
    assert problems(result) == [
        (f"{run.folder}/model/generator.safetensors", "was altered: another sha256")
    ]


def test_a_whole_root_includes_the_registry(registered):
    store, _ = registered
    result = verify(store)
    assert (result.ok, result.stages, result.records) == (True, 3, 2)


@pytest.mark.parametrize("name", ["v1", "champion"])
def test_a_changed_registry_record_is_named(registered, name):
    store, _ = registered
    key = f"registry/dpnet/{name}.json"
    edit(store, key, hole_psnr=99.0)
    found = problems(verify(store))
    assert {where for where, _ in found} == {key}
    assert any("differs from the registered record" in text for _, text in found)


def test_a_record_that_names_another_run_is_named(registered):
    store, run = registered
    key = "registry/dpnet/v1.json"
    named = json.loads(store.read(key))["run"] | {"content_digest": "0" * 64}
    edit(store, key, run=named)
    assert (key, f"its run, {run.folder}, has another content digest") in problems(verify(store))


def test_a_record_of_another_version_is_named(registered):
    store, _ = registered
    store.write("registry/dpnet/v7.json", store.read("registry/dpnet/v1.json"))
    assert ("registry/dpnet/v7.json", "was altered: it is the record of another version") in (
        problems(verify(store))
    )


def test_a_damaged_record_is_named(registered):
    store, _ = registered
    store.write("registry/dpnet/champion.json", b"[]")
    assert ("registry/dpnet/champion.json", "was altered: it is not a whole record") in problems(
        verify(store)
    )


def test_the_result_is_json(store, chain):
    store.delete(f"{chain[1].folder}/model/w")
    result = json.loads(json.dumps(verify(store).to_json()))
    assert result["ok"] is False
    assert result["problems"] == [{"where": f"{chain[1].folder}/model/w", "problem": "is missing"}]
    assert (result["stages"], result["files"]) == (4, 4)


def test_a_large_file_is_hashed_in_pieces(store, monkeypatch):
    monkeypatch.setattr("dpnet.pipeline.verify_files.CHUNK", 7)
    stage = small_root.commit(store, "data", "data/a", {"big": bytes(range(100))})
    assert verify(store).ok
    store.write(f"{stage.folder}/big", bytes(range(99)) + b"\0")
    assert not verify(store).ok


def test_a_missing_folder_or_a_file_is_an_error(tmp_path):
    with pytest.raises(PipelineError, match="nosuch does not exist: name a root"):
        verify_uri(str(tmp_path / "nosuch"))
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(PipelineError, match="file is a file: name a root"):
        verify_uri(str(tmp_path / "file"))


@pytest.mark.parametrize(("inside", "stages"), [("data", 2), ("runs", 2), ("data/a", 1)])
def test_a_folder_in_a_root_is_verified_with_everything_in_it(store, chain, inside, stages):
    result = verify_uri(str(store.folder / inside))
    assert (problems(result), result.target, result.stages) == ([], inside, stages)
    key = f"{chain[0].folder}/train-000000.tar"
    store.write(key, b"t" * 99 + b"u")
    assert problems(verify_uri(str(store.folder / inside))) == [
        (key, "was altered: another sha256")
    ]


def test_the_registry_of_a_root_is_verified_with_its_records(registered):
    store, _ = registered
    result = verify_uri(str(store.folder / "registry"))
    assert (result.ok, result.stages, result.records) == (True, 3, 2)


def test_a_folder_above_a_root_is_refused_with_the_name_of_the_root(store, chain):
    where = store.folder.parent
    with pytest.raises(PipelineError) as caught:
        verify_uri(str(where))
    assert f"{where} is not a root, but it contains one. Name that root: {store.folder}." in str(
        caught.value
    )


def test_an_altered_folder_name_does_not_make_a_root_the_folder_of_another(store, chain):
    edit(store, f"{chain[0].folder}/manifest.json", folder=f"x/{chain[0].folder}")
    assert verify_uri(str(store.folder)).problems
