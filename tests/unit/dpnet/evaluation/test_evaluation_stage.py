"""The evaluation stage on real data: its rows, figures and report, interruptions and damage."""

import json
import shutil

import numpy as np
import pyarrow as pa
import pytest
import small_root
from random_weights import random_alexnet, random_inception, shrink_inception
from resumed_counts import record_resumed
from small_shards import flip_byte

from data_prep.core.digest import sha256_json
from data_prep.core.errors import PipelineError
from data_prep.core.storage.local import LocalStore
from data_prep.masks.codec import valid_from_png
from data_prep.masks.plan import BINS
from data_prep.pictures.decoding import decode_rgb
from data_prep.pictures.limits import MAX_PIXELS, Limits
from data_prep.shards.shards import decode_table, iterate_shard, read_index, split_shards
from dpnet.evaluation import stage as evaluation_stage
from dpnet.evaluation.baselines import mean_fill
from dpnet.evaluation.bench import Measured
from dpnet.evaluation.metrics import hole_psnr
from dpnet.evaluation.parts import PartStore
from dpnet.evaluation.protocol import METHODS, PROTOCOL_VERSION, figures
from dpnet.evaluation.settings import EvaluateSettings
from dpnet.evaluation.stage import evaluate
from dpnet.inpainting import tiles


@pytest.fixture(autouse=True)
def _no_weights_of_this_machine(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in ("TORCH_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Return real images, masks in shards of three, and a real generator without training."""
    store = LocalStore(tmp_path_factory.mktemp("data") / "root")
    images, masks = small_root.real_data(store, shard_samples=3)
    return store, images, masks, small_root.trained(store, images=images, masks=masks)


@pytest.fixture
def fresh(data, tmp_path):
    """Copy the data to a folder that the test may change."""
    store = LocalStore(tmp_path / "root")
    shutil.copytree(data[0].folder, store.folder, ignore=shutil.ignore_patterns("evaluations"))
    return store, *data[1:]


def evaluated(where, **settings):
    store, *inputs = where
    return evaluate(EvaluateSettings(**settings), *inputs, store)


@pytest.fixture(scope="module")
def done(data):
    return evaluated(data)


def rows_of(store, ref):
    return decode_table(store.read(f"{ref.folder}/metrics.parquet"))


def samples(store, ref, split):
    """Return {key: payload} of a stage's split."""
    found = {}
    for tar in split_shards(store, ref.folder, split):
        for key, files in iterate_shard(store, tar):
            found[key] = next(data for extension, data in files.items() if extension != "json")
    return found


class Stopped(Exception):
    pass


def test_every_evaluation_mask_is_measured_once_with_each_method(data, done):
    store, _, masks, _ = data
    rows = rows_of(store, done)
    keys = [(row["mask"], row["method"]) for row in rows]
    assert sorted(keys) == sorted((m, w) for m in samples(store, masks, "eval") for w in METHODS)


def test_images_come_only_from_the_test_split(data, done):
    store, images, _, _ = data
    used = {row["image"] for row in rows_of(store, done)}
    assert used
    assert used <= set(samples(store, images, "test"))


def test_a_row_holds_the_metric_of_its_pair(data, done):
    store, images, masks, _ = data
    images_by_key, holes = samples(store, images, "test"), samples(store, masks, "eval")
    for row in rows_of(store, done)[:12]:
        truth, valid = (
            decode_rgb(images_by_key[row["image"]], Limits(MAX_PIXELS)).rgb,
            valid_from_png(holes[row["mask"]]),
        )
        assert row["hole_ratio"] == pytest.approx(1 - valid.mean())
        if row["method"] == "mean_fill":
            assert row["hole_psnr"] == hole_psnr(mean_fill(truth, valid), truth, valid)


def test_all_methods_are_measured_on_the_same_pair(data, done):
    rows = rows_of(data[0], done)
    for some in zip(*(rows[n :: len(METHODS)] for n in range(len(METHODS))), strict=True):
        assert len({(row["image"], row["mask"]) for row in some}) == 1
        assert len({row["hole_psnr"] for row in some}) == len(METHODS)


def test_the_summary_has_the_figures_of_every_bin_and_their_mean(data, done):
    rows = rows_of(data[0], done)
    found = done.summary["figures"]
    assert set(found) == {*BINS, "all", "mean_over_bins"}
    means = []
    for name in BINS:
        values = [r["hole_psnr"] for r in rows if (r["ratio_bin"], r["method"]) == (name, "dpnet")]
        means.append(np.mean(values))
        assert found[name]["dpnet"]["hole_psnr"] == pytest.approx(means[-1], abs=1e-4)
    assert done.summary["hole_psnr"] == pytest.approx(np.mean(means), abs=1e-4)


def test_intervals_enclose_their_mean_and_are_the_same_each_time(data, done):
    rows = rows_of(data[0], done)
    table = pa.Table.from_pylist(rows)
    found = figures(table, "a")
    assert found == figures(table, "a")
    assert found != figures(table, "b")
    for method in METHODS:
        figure = found["all"]["methods"][method]["hole_psnr"]
        assert figure["low"] < figure["mean"] < figure["high"]


def test_the_report_lists_metrics_that_were_not_computed_with_a_reason(data, done):
    report = json.loads(data[0].read(f"{done.folder}/report.json"))
    assert {item["metric"] for item in report["not_computed"]} == {"LPIPS", "FID", "P-IDS, U-IDS"}
    assert all("weights" in item["reason"] for item in report["not_computed"])
    assert report["pairs_digest"] == done.summary["pairs_digest"]


def test_the_same_request_gives_the_same_bytes_with_any_number_of_threads(fresh, done):
    ref = evaluated(fresh, threads=1)
    assert not ref.skipped
    assert (ref.folder, ref.content_digest) == (done.folder, done.content_digest)


def test_a_second_call_is_skipped(data, done):
    assert evaluated(data).skipped


def test_another_model_is_compared_on_the_same_pairs(fresh, done):
    store, images, masks, _ = fresh
    other = small_root.trained(store, seed=1, images=images, masks=masks)
    ref = evaluated((store, images, masks, other))
    assert ref.folder != done.folder
    assert ref.summary["pairs_digest"] == done.summary["pairs_digest"]
    assert ref.summary["hole_psnr"] != done.summary["hole_psnr"]


def test_the_digest_of_the_pairs_names_every_pair(data, done):
    store, images, masks, _ = data
    named = [[row["image"], row["mask"]] for row in rows_of(store, done)[:: len(METHODS)]]
    assert len(named) == done.summary["pairs"] > 1
    whole = {"images": images.content_digest, "masks": masks.content_digest, "pairs": named}
    assert done.summary["pairs_digest"] == sha256_json(whole)


def test_another_protocol_is_another_evaluation(data, done, monkeypatch):
    def build(work):
        raise Stopped(work.folder)

    monkeypatch.setattr(evaluation_stage, "PROTOCOL_VERSION", PROTOCOL_VERSION + 1)
    monkeypatch.setattr(evaluation_stage, "_build", lambda work, *_: build(work))
    with pytest.raises(Stopped):
        evaluated(data)


def test_another_seed_gives_other_pairs(fresh, done):
    assert evaluated(fresh, seed=1).summary["pairs_digest"] != done.summary["pairs_digest"]


def test_fewer_pairs_are_spread_over_the_bins(fresh):
    ref = evaluated(fresh, max_pairs=6)
    assert ref.summary["pairs"] == 6
    assert {row["ratio_bin"] for row in rows_of(fresh[0], ref)} == set(BINS)


def test_the_requested_number_of_example_images_is_written_for_each_bin(fresh, data, done):
    names = [e.key.rsplit("/")[-1] for e in data[0].list(f"{done.folder}/pictures")]
    assert len(names) == 12
    assert {name[:9] for name in names} == set(BINS)
    data_of_strip = data[0].read(f"{done.folder}/pictures/{names[0]}")
    strip = decode_rgb(data_of_strip, Limits(MAX_PIXELS))
    assert strip.height == small_root.SIZE
    assert strip.width > (len(METHODS) + 3) * small_root.SIZE  # and truth, input, error
    assert not list(fresh[0].list(f"{evaluated(fresh, pictures=0).folder}/pictures"))


def test_an_interrupted_evaluation_resumes_at_the_next_shard(fresh, done, monkeypatch):
    real, seen = tiles.inpaint_arrays, []

    def stopping(generator, images, valid):
        if len(seen) == 6:
            raise Stopped
        seen.append(len(images))
        return real(generator, images, valid)

    with monkeypatch.context() as patched:
        patched.setattr(tiles, "inpaint_arrays", stopping)
        with pytest.raises(Stopped):
            evaluated(fresh)
    seen.clear()
    monkeypatch.setattr(
        tiles, "inpaint_arrays", lambda g, i, v: (seen.append(len(i)), real(g, i, v))[1]
    )
    resumed = record_resumed(monkeypatch)
    ref = evaluated(fresh)
    assert resumed["evaluate"] == 6
    assert seen == [1] * 18  # the two remaining shards, then the examples; each image by itself
    assert ref.content_digest == done.content_digest
    assert not list(fresh[0].list(f"{ref.folder}/parts"))


def another_value(body):
    body["rows"][0]["psnr"] += 1.0


def other_pairs(body):
    body["rows"] = body["rows"][len(METHODS) :] + body["rows"][: len(METHODS)]
    body["sha256"] = sha256_json(body["rows"])


@pytest.mark.parametrize("damage", [dict.clear, another_value, other_pairs])
def test_altered_rows_of_an_interrupted_evaluation_are_measured_again(
    fresh, done, monkeypatch, damage
):
    store = fresh[0]
    real = tiles.inpaint_arrays
    calls = []

    def stopping(generator, images, valid):
        calls.append(1)
        if len(calls) == 4:
            raise Stopped
        return real(generator, images, valid)

    with monkeypatch.context() as patched:
        patched.setattr(tiles, "inpaint_arrays", stopping)
        with pytest.raises(Stopped):
            evaluated(fresh)
    (part,) = store.list(f"{done.folder}/parts")
    assert part.key.endswith("parts/eval-000000-000000.json")
    body = json.loads(store.read(part.key))
    damage(body)
    store.write(part.key, json.dumps(body).encode())
    assert evaluated(fresh).content_digest == done.content_digest


@pytest.mark.parametrize("kind", ["image", "mask"])
def test_a_flipped_byte_is_refused_with_shard_and_sample(fresh, kind):
    store, images, masks, _ = fresh
    ref, split = (images, "test") if kind == "image" else (masks, "eval")
    tar = split_shards(store, ref.folder, split)[0]
    row = read_index(store, tar)[0]
    flip_byte(store.path(tar), row["offset"] + row["size"] // 2)
    with pytest.raises(PipelineError) as raised:
        evaluated(fresh)
    assert f"sample {row['key']} of {store.label}/{tar} cannot be used (its bytes" in str(
        raised.value
    )
    assert "run `dpnet verify` on the root" in str(raised.value)


@pytest.mark.parametrize("kind", ["image", "mask"])
def test_a_damaged_index_is_refused_with_its_name(fresh, kind):
    store, images, masks, _ = fresh
    ref, split = (images, "test") if kind == "image" else (masks, "eval")
    index = split_shards(store, ref.folder, split)[0].replace(".tar", ".parquet")
    flip_byte(store.path(index), 20)
    with pytest.raises(PipelineError, match=f"{index} was altered or cut short: run `dpnet verify"):
        evaluated(fresh)


def test_masks_larger_than_the_images_are_refused(fresh):
    from data_prep.masks.settings import MasksSettings
    from data_prep.masks.stage import prepare_masks

    store, images, _, run = fresh
    config = MasksSettings(name="other", size=48, train=2, eval_per_bin=1, recipes={"outpaint": 1})
    masks = prepare_masks(config, store)
    with pytest.raises(PipelineError, match=r"32 x 32 pixels but the masks are 48 x 48"):
        evaluated((store, images, masks, run))


def test_the_page_shows_the_training_and_does_not_count_as_content(data, done):
    manifest = json.loads(data[0].read(f"{done.folder}/manifest.json"))
    page = next(f for f in manifest["files"] if f["path"] == "report.html")
    assert not page["content"]
    text = data[0].read(f"{done.folder}/report.html").decode()
    assert "Hole PSNR on validation images" in text
    assert done.request_digest[:12] in text


@pytest.fixture
def lpips_file(tmp_path):
    return random_alexnet(tmp_path / "alexnet.safetensors")


def test_with_weights_each_row_has_its_lpips_and_the_figures_its_means(
    fresh, data, done, lpips_file
):
    ref = evaluated(fresh, lpips_weights=str(lpips_file))
    rows = rows_of(fresh[0], ref)
    assert all(row["lpips"] > 0 for row in rows)
    report = json.loads(fresh[0].read(f"{ref.folder}/report.json"))
    of_dpnet = [row["lpips"] for row in rows if row["method"] == "dpnet"]
    found = report["figures"]["all"]["methods"]["dpnet"]["lpips"]
    assert found["mean"] == pytest.approx(np.mean(of_dpnet))
    assert found["low"] < found["mean"] < found["high"]
    assert "LPIPS" not in {item["metric"] for item in report["not_computed"]}
    assert ref.summary["figures"]["all"]["dpnet"]["lpips"] > 0
    assert "<caption>LPIPS" in fresh[0].read(f"{ref.folder}/report.html").decode()
    without = rows_of(data[0], done)
    assert [row | {"lpips": None} for row in rows] == without


def test_only_the_bytes_of_the_weights_are_in_the_request(fresh, done, lpips_file, tmp_path):
    ref = evaluated(fresh, lpips_weights=str(lpips_file), threads=1)
    assert ref.folder != done.folder
    moved = tmp_path / "elsewhere.safetensors"
    shutil.move(lpips_file, moved)
    again = evaluated(fresh, lpips_weights=str(moved))
    assert (again.skipped, again.folder) == (True, ref.folder)
    other = random_alexnet(tmp_path / "other.safetensors", seed=1)
    assert evaluated(fresh, lpips_weights=str(other)).folder != ref.folder
    assert evaluated(fresh, allow_downloads=False).folder == done.folder


def test_lpips_does_not_depend_on_interruptions_or_threads(fresh, lpips_file, monkeypatch):
    ref = evaluated(fresh, lpips_weights=str(lpips_file), threads=1)
    shutil.rmtree(fresh[0].path(ref.folder))
    real, seen = tiles.inpaint_arrays, []

    def stopping(generator, images, valid):
        if len(seen) == 6:
            raise Stopped
        seen.append(len(images))
        return real(generator, images, valid)

    with monkeypatch.context() as patched:
        patched.setattr(tiles, "inpaint_arrays", stopping)
        with pytest.raises(Stopped):
            evaluated(fresh, lpips_weights=str(lpips_file))
    again = evaluated(fresh, lpips_weights=str(lpips_file), threads=3)
    assert again.content_digest == ref.content_digest


def test_masks_of_different_sizes_are_refused(fresh, monkeypatch):
    from dpnet.loading.samples import Samples

    real = Samples.column
    monkeypatch.setattr(
        Samples, "column", lambda own, name: real(own, name) + (np.arange(len(own)) == 3)
    )
    with pytest.raises(PipelineError, match=r"eval-00000003 is 33 x 33 pixels but others are 32"):
        evaluated(fresh)


def test_a_model_with_weights_that_are_not_finite_is_refused_in_one_sentence(fresh):
    import torch

    from data_prep.core.stage import Produced, Request, run_stage
    from dpnet.model import build_generator
    from dpnet.model_store.weights import save_generator

    store, images, masks, _ = fresh

    def build(work):
        generator = build_generator("tiny")
        torch.nn.init.constant_(generator.out.weight, float("nan"))
        return Produced(save_generator(store, work.folder, generator, {}), {"steps": 1})

    run = run_stage(store, Request("train", "nan", "runs", {"nan": True}), build)
    with pytest.raises(PipelineError, match="values that are not finite") as raised:
        evaluated((store, images, masks, run))
    assert str(raised.value).count("\n") == 0


class ManyPairs:
    """A stand-in for the pairs and the workers: many shards, and the values of no image."""

    def __init__(self, shards, of_shard):
        self.masks = self
        self.pairs = [(n, n) for n in range(shards * of_shard)]
        self.shard_key = lambda position: f"eval-{position // of_shard:06d}.tar"

    def keys(self, pair):
        name = f"{pair[0]:040d}"
        return {"image": name, "mask": name, "ratio_bin": "0.01-0.10", "hole_ratio": 0.05}

    def run(self, tasks, tick):
        values = ("psnr", "hole_psnr", "ssim", "hole_ssim", "l1", "hole_l1", "lpips")
        for number, task in enumerate(tasks):
            rows = [
                {**self.keys(pair), "method": method, **dict.fromkeys(values, pair[0] / 7.0)}
                for pair in task.part.pairs
                for method in METHODS
            ]
            tick(task.size)
            yield number, Measured(rows, None)


def test_the_memory_hardly_grows_with_the_number_of_pairs(tmp_path):
    """Rows as Python objects would need 1,000 bytes each, and the images 12,000 and more."""
    import tracemalloc

    store = LocalStore(tmp_path)
    peaks, arrow = [], []
    for number, shards in enumerate((1, 2, 20)):  # the first one imports pyarrow
        pairs = ManyPairs(shards, 50)
        parts = PartStore(store, f"evaluations/{number}/parts", pairs, list(METHODS), False)
        tracemalloc.start()
        table, _ = evaluation_stage._measure_all(parts, pairs.run)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        arrow.append(table.nbytes)
        assert table.num_rows == shards * 50 * len(METHODS)
    more = 18 * 50 * len(METHODS)
    assert (peaks[2] - peaks[1]) / more < 250
    assert (arrow[2] - arrow[1]) / more < 250


def test_new_options_leave_the_requests_of_older_configs_alone():
    """A retrain of an older version is found by these settings."""
    older = {"split": "test", "seed": 0, "max_pairs": 12_000, "pictures": 2}
    assert EvaluateSettings().requested() == older
    new = EvaluateSettings(lpips_weights="a", allow_downloads=True, compare={"x": "y"}, threads=3)
    assert new.requested() == older


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory):
    return random_inception(tmp_path_factory.mktemp("weights") / "inception.safetensors")


@pytest.fixture
def small_inception(monkeypatch):
    shrink_inception(monkeypatch.setattr)


@pytest.mark.usefixtures("small_inception")
def test_with_inception_weights_the_sets_are_compared(fresh, data, done, inception_file):
    ref = evaluated(fresh, inception_weights=str(inception_file))
    store = fresh[0]
    report = json.loads(store.read(f"{ref.folder}/report.json"))
    sets = report["sets"]
    assert list(sets["methods"]) == list(METHODS)
    assert all(own["fid"] > 0 for own in sets["methods"].values())
    assert (sets["pairs"], sets["official"]) == (12, False)
    assert {item["metric"] for item in report["not_computed"]} == {"LPIPS"}
    assert "FID" in report["protocol"]
    shown = ref.summary["figures"]["all"]["dpnet"]
    assert shown["fid"] == round(sets["methods"]["dpnet"]["fid"], 4)
    page = store.read(f"{ref.folder}/report.html").decode()
    assert "All pairs together: FID, P-IDS and U-IDS" in page
    assert "not the published file" in page
    assert "12 pairs are fewer than the 2,048 features" in page
    assert rows_of(store, ref) == rows_of(data[0], done)
    assert not list(store.list(f"{ref.folder}/parts"))


@pytest.mark.usefixtures("small_inception")
def test_the_features_of_an_interrupted_evaluation_are_checked_and_kept(
    fresh, inception_file, monkeypatch
):
    from dpnet.evaluation.parts import PartStore

    real, written = PartStore.write, []

    def stopping(own, part, measured):
        if len(written) == 3:
            raise Stopped
        real(own, part, measured)
        written.append(part.name)

    whole = evaluated(fresh, inception_weights=str(inception_file), threads=3)
    store = fresh[0]
    shutil.rmtree(store.path(whole.folder))
    with monkeypatch.context() as patched:
        patched.setattr(PartStore, "write", stopping)
        with pytest.raises(Stopped):
            evaluated(fresh, inception_weights=str(inception_file))
    first, second, _ = sorted(store.path(f"{whole.folder}/parts").glob("*.npy"))
    flip_byte(first, first.stat().st_size - 9)
    second.unlink()
    resumed = record_resumed(monkeypatch)
    again = evaluated(fresh, inception_weights=str(inception_file))
    assert resumed["evaluate"] == 3
    assert again.content_digest == whole.content_digest


def test_large_shards_have_several_parts_with_whole_batches():
    from dpnet.evaluation.bench import BATCH
    from dpnet.evaluation.parts import PART_PAIRS, split_into_parts

    parts = split_into_parts(ManyPairs(2, PART_PAIRS + 3))
    assert [part.name for part in parts] == [
        "eval-000000-000000", "eval-000000-000256", "eval-000001-000000", "eval-000001-000256",
    ]  # fmt: skip
    assert [len(part.pairs) for part in parts] == [256, 3, 256, 3]
    assert [pair for part in parts for pair in part.pairs] == ManyPairs(2, PART_PAIRS + 3).pairs
    assert PART_PAIRS % BATCH == 0


def test_on_a_cpu_each_call_of_a_network_has_one_thread_and_one_image(fresh, done, monkeypatch):
    """torch splits sums by its number of threads: tiny at 256 pixels had other bytes with two."""
    import torch

    real, seen = tiles.inpaint_arrays, set()

    def noting(generator, images, valid):
        seen.add((torch.get_num_threads(), len(images)))
        return real(generator, images, valid)

    monkeypatch.setattr(tiles, "inpaint_arrays", noting)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        ref = evaluated(fresh, threads=2)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert seen == {(1, 1)}
    assert ref.content_digest == done.content_digest


def test_parts_are_kept_until_the_commit(fresh, monkeypatch):
    """A kill before the commit costs no measurement."""
    seen = []
    real = LocalStore.create

    def noting(own, key, data):
        if key.endswith("manifest.json"):
            seen.extend(entry.key for entry in own.list(f"{key.rpartition('/')[0]}/parts"))
        return real(own, key, data)

    monkeypatch.setattr(LocalStore, "create", noting)
    ref = evaluated(fresh)
    assert len(seen) == 4
    assert not list(fresh[0].list(f"{ref.folder}/parts"))
