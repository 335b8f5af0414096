"""The report: a complete HTML page that needs nothing else."""

import base64
import hashlib
import io
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from data_prep.core.manifest import Manifest
from data_prep.pictures.decoding import decode_rgb
from data_prep.pictures.limits import MAX_PIXELS, Limits
from dpnet.evaluation.examples import choose_examples, draw_example, draw_strip, error_map
from dpnet.evaluation.protocol import (
    METHODS,
    NO_INCEPTION,
    NO_LPIPS_WEIGHTS,
    PROTOCOL,
    not_computed,
)
from dpnet.evaluation.report import render_report, training_curves
from dpnet.evaluation.report_script import POLICY

PSNR = {
    "dpnet": 18.25,
    "smooth_fill": 18.0,
    "telea": 19.5,
    "navier_stokes": 18.75,
    "mean_fill": 16.0,
}
LOG = [
    {"kind": "validation", "step": 0, "hole_psnr": 10.0, "mean_fill_psnr": 12.0},
    {"kind": "train", "step": 25, "losses": {"hole": 0.2, "adversarial": 0.7}},
    {"kind": "train", "step": 50, "losses": {"hole": 0.1}},
    {
        "kind": "validation",
        "step": 50,
        "hole_psnr": 13.0,
        "mean_fill_psnr": 12.0,
        "smooth_fill_psnr": 12.5,
    },
]


def figure(mean, half=0.5):
    return {"mean": mean, "low": mean - half, "high": mean + half}


def group(psnr=PSNR, pairs=4, lpips=True):
    methods = {
        method: {
            "hole_psnr": figure(value),
            "psnr": figure(value + 6),
            "ssim": figure(0.9),
            "l1": figure(30 - value),
        }
        | ({"lpips": figure(value / 100)} if lpips else {})
        for method, value in psnr.items()
    }
    return {"pairs": pairs, "methods": methods, "paired": paired(psnr, lpips)}


def paired(psnr=PSNR, lpips=True):
    return {
        method: {"hole_psnr": figure(psnr["dpnet"] - value, 0.2), "ssim": figure(0.01, 0.02)}
        | ({"lpips": figure((psnr["dpnet"] - value) / 100, 0.001)} if lpips else {})
        for method, value in psnr.items()
        if method != "dpnet"
    }


def report(psnr=PSNR, lpips=True, **changes):
    means = {
        method: {"hole_psnr": value, "ssim": 0.9} | ({"lpips": value / 100} if lpips else {})
        for method, value in psnr.items()
    }
    bins = {name: group(psnr, lpips=lpips) for name in ("0.01-0.10", "0.10-0.20")}
    return {
        "pairs": 1234,
        "pairs_digest": "d" * 64,
        "methods": {name: METHODS.get(name, name) for name in psnr},
        "compared": {},
        "empty_holes": 0,
        "figures": {
            "bins": bins,
            "all": group(psnr, 1234, lpips),
            "mean_over_bins": means,
            "paired": paired(psnr, lpips),
        },
        "perfect": dict.fromkeys(METHODS, 0),
        "protocol": PROTOCOL,
        "not_computed": not_computed(None if lpips else NO_LPIPS_WEIGHTS, NO_INCEPTION),
    } | changes


def stage(name="small", **changes):
    made = Manifest(
        stage="train",
        name=name,
        folder="runs/small-abc",
        request_digest="a" * 64,
        content_digest="c" * 64,
        settings={"steps": 5},
        inputs={},
        sources={},
        files=[],
        summary={"hole_psnr": 20.0},
        created="2026-01-31T12:00:00Z",
        seconds=1.0,
    )
    return replace(made, **changes)


def rows(psnr=PSNR, mask="eval-2", lpips=0.25, **changes):
    fields = {"image": "test-1", "mask": mask, "ratio_bin": "0.01-0.10", "hole_ratio": 0.0625}
    return [
        fields
        | {"method": method, "hole_psnr": value, "psnr": 20.0, "ssim": 0.9, "l1": 1.0}
        | {"lpips": lpips, "hole_ssim": 0.5, "hole_l1": 2.0}
        | changes
        for method, value in psnr.items()
    ]


def example(mark="", side=16, **changes):
    valid = np.ones((side, side), np.uint8)
    valid[4:8, 4:8] = 0
    truth = np.full((side, side, 3), 100, np.uint8)
    made = rows(**changes)
    methods = {row["method"]: truth for row in made}
    return draw_example(truth, valid, methods, made, mark)


def render(figures=None, pictures=(), log=LOG, chain=None):
    return render_report(figures or report(), list(pictures), log, chain or [stage()])


class Reader(HTMLParser):
    """Collects elements, and checks that they are closed in order."""

    EMPTY = ("meta", "img", "br", "input")

    def __init__(self, text):
        super().__init__()
        self.open, self.elements = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def text_of(page):
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", "", page))


def test_the_page_is_well_formed():
    assert Reader(render(pictures=[example()])).open == []


def test_the_page_needs_no_other_file_and_no_network():
    page = render(pictures=[example()])
    elements = Reader(page).elements
    assert not [tag for tag, _ in elements if tag in ("link", "iframe", "object", "base")]
    assert [attributes for tag, attributes in elements if tag == "script"] == [{}]
    for _, attributes in elements:
        for name in ("src", "href", "xlink:href"):
            assert attributes.get(name, "#").startswith(("data:image/webp;base64,", "#"))
        assert not [name for name in attributes if name.startswith("on")]
    assert "@import" not in page
    assert not re.search(r"url\((?!#)", page)


def test_the_browser_runs_only_the_script_of_the_report():
    page = render()
    (script,) = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in POLICY
    assert f'http-equiv="Content-Security-Policy" content="{POLICY}"' in page
    assert "unsafe-inline" not in POLICY.partition("script-src")[2]


def test_the_first_sentence_is_the_verdict():
    text = text_of(render())
    assert "In hole PSNR, DPNet is worse than Telea and Navier-Stokes: train longer." in text
    assert "Measured on 1,234 held-out pairs" in text


def cells(page, start):
    """Return the rows of the table that begins after `start`, as lists of text."""
    table = page[page.index(start) :].partition("</table>")[0]
    found = re.findall(r"<tr>(.*?)</tr>", table, re.DOTALL)
    return [[text_of(cell) for cell in re.findall(r"<t[hd][ >].*?</t[hd]>", row)] for row in found]


def test_paired_differences_have_a_word_that_knows_which_way_is_better():
    found = {row[0]: row[1:] for row in cells(render(), 'class="paired"')}
    assert found["DPNet minus"] == ["hole PSNR, dB", "SSIM", "LPIPS"]
    assert found["Smooth fill"][0] == "+0.25 better+0.05 to +0.45"
    assert found["Smooth fill"][1] == "+0.0100 level-0.0100 to +0.0300"
    # A higher LPIPS is worse.
    assert found["Smooth fill"][2] == "+0.0025 worse+0.0015 to +0.0035"
    assert found["Telea"][0].startswith("-1.25 worse")
    assert found["Telea"][2].startswith("-0.0125 better")


def test_lpips_has_a_table_and_tiles_only_if_it_was_computed():
    page = render()
    assert "<caption>LPIPS" in page
    assert "LPIPS 0.1825" in text_of(page)
    without = render(report(lpips=False), [example(lpips=None)])
    assert "<caption>LPIPS" not in without
    assert ">LPIPS</th>" not in without
    assert 'value="lpips"' not in without
    assert 'data-lpips=""' in without


def test_another_model_has_a_column_a_tile_images_and_its_digest():
    psnr = {"dpnet": 18.25, "lama<b>": 21.0, **{m: v for m, v in PSNR.items() if m != "dpnet"}}
    page = render(report(psnr, compared={"lama<b>": "e" * 64}), [example(psnr=psnr)])
    assert Reader(page).open == []
    assert "lama<b>" not in page
    assert page.count(">lama&lt;b&gt;</th>") == 6  # paired differences and five metrics
    assert "21.00 dBlama&lt;b&gt;" in text_of(page)
    assert "e" * 64 in page


def test_empty_holes_are_counted():
    sentence = "Pairs with an empty hole, without a hole PSNR"
    assert f"{sentence}: 3." in text_of(render(report(empty_holes=3)))
    assert sentence not in text_of(render())


def test_the_best_figure_of_a_row_is_bold_also_if_lower_is_better():
    page = render()
    assert "<b>19.50</b>" in page  # Telea's hole PSNR
    assert "<b>10.50</b>" in page  # Telea's L1, the lowest
    assert "<b>18.25</b>" not in page.partition("By size of the hole")[2]


def test_the_tables_show_every_bin_with_its_interval():
    text = text_of(render())
    assert "1–10 %" in text
    assert "10–20 %" in text
    assert "17.75 – 18.75" in text


def test_perfect_holes_are_counted():
    perfect = {**dict.fromkeys(METHODS, 0), "dpnet": 3}
    assert "counted as 100 dB: DPNet 3" in text_of(render(report(perfect=perfect)))
    assert "counted as 100 dB:" not in text_of(render())


def test_a_card_has_each_image_once_and_the_slider_two():
    page = render(pictures=[example(mark="best")])
    images = re.findall(r'<img src="data:image/webp;base64,([^"]*)" alt="([^:"]*):', page)
    names = [name for _, name in images]
    thumbs = ["Truth", "DPNet&#x27;s error", *METHODS.values()]
    assert names == ["DPNet", "input with the hole", *thumbs]
    for data, _ in images:
        assert Image.open(io.BytesIO(base64.b64decode(data))).size == (16, 16)
    assert '<b class="mark best">Best</b>' in page
    assert "+0.25 dB to the smooth fill" in page


def test_cards_carry_the_values_that_sort_them():
    page = render(pictures=[example(), example(mask="eval-3", psnr=PSNR | {"dpnet": 30.0})])
    cards = [a for tag, a in Reader(page).elements if tag == "article"]
    assert [card["data-order"] for card in cards] == ["0", "1"]
    assert [card["data-hole_psnr"] for card in cards] == ["18.25", "30"]
    assert [card["data-gain"] for card in cards] == ["0.25", "12"]
    options = [a["value"] for tag, a in Reader(page).elements if tag == "option"]
    assert {"gain", "hole_psnr", "ssim", "lpips", "l1"} < set(options)
    for option in options:
        assert option in ("low", "high") or f"data-{option}" in cards[0]


def test_the_best_median_and_worst_pairs_are_by_gain_over_the_smooth_fill():
    pairs = [(n, n) for n in range(7)]
    gains = [1.0, -3.0, 0.5, 4.0, 0.0, 0.2, -1.0]
    made = []
    for number, gain in enumerate(gains):
        # Large holes have a low PSNR and may have the best gain.
        psnr = PSNR | {"smooth_fill": 40.0 - 5 * gain, "dpnet": 40.0 - 4 * gain}
        made += rows(psnr, mask=f"eval-{number}", ratio_bin=f"0.{number % 2}0-0.50")
    table = pa.Table.from_pylist(made)
    assert choose_examples(pairs, table, 1) == {
        (3, 3): "best",
        (5, 5): "median",
        (1, 1): "worst",
        (0, 0): "",
    }
    assert choose_examples(pairs, table, 0) == {}
    assert len(choose_examples(pairs, table, 50)) == 7


def test_a_pair_with_an_empty_hole_is_no_best_or_worst_pair():
    made = [r for n, v in enumerate((None, 18.0)) for r in rows(mask=f"e-{n}", hole_psnr=v)]
    assert choose_examples([(0, 0), (1, 1)], pa.Table.from_pylist(made), 1) == {
        (1, 1): "best",
        (0, 0): "",
    }
    assert Reader(render(pictures=[example(hole_psnr=None)])).open == []


def test_an_error_map_goes_from_black_over_red_and_yellow_to_white():
    truth = np.zeros((1, 5, 3), np.uint8)
    composite = truth + np.array([0, 10, 35, 64, 255], np.uint8)[:, None]
    found = error_map(composite, truth)[0].tolist()
    assert found[0] == [0, 0, 0]
    assert found[1] == [120, 0, 0]
    assert found[2] == [255, 163, 0]
    assert found[3] == found[4] == [255, 255, 255]


def test_metrics_that_were_not_computed_are_listed_with_a_reason():
    text = text_of(render(report(lpips=False)))
    for item in not_computed(NO_LPIPS_WEIGHTS, NO_INCEPTION):
        assert item["metric"] in text
        assert item["reason"] in text


def test_names_and_settings_cannot_add_markup():
    evil = "<script>alert(1)</script>&\"'"
    chain = [stage(evil, folder=evil, stage=evil, settings={"a": evil})]
    page = render(report(), [example(image=evil, mask=evil)], LOG, chain)
    assert "<script>alert" not in page
    assert page.count("<script") == 1
    assert Reader(page).open == []


def test_digests_of_the_whole_chain_are_shown():
    text = text_of(render(chain=[stage(), stage(request_digest="b" * 64, folder="evaluations/x")]))
    assert "a" * 12 in text
    assert "b" * 12 in text
    assert "d" * 64 in text


def test_a_stage_that_is_not_committed_yet_has_no_content_digest():
    own = stage(content_digest="", summary={}, sources={})
    assert Reader(render(chain=[stage(), own])).open == []


def test_curves_come_from_the_log():
    curves, losses = training_curves(LOG)
    assert curves == {
        "dpnet": [(0, 10.0), (50, 13.0)],
        "smooth_fill": [(50, 12.5)],  # logs of earlier versions do not have it
        "mean_fill": [(0, 12.0), (50, 12.0)],
    }
    assert losses == {"hole": [(25, 0.2), (50, 0.1)], "adversarial": [(25, 0.7)]}


def test_a_run_without_a_log_says_so():
    page = render(log=[])
    assert "This run has no log" in page
    assert page.count("<svg") == 1


def test_charts_take_the_colour_of_the_page_for_light_and_dark():
    page = render()
    assert page.count("<svg") == 3
    assert "currentColor" in page
    assert "prefers-color-scheme: dark" in page


def test_the_same_figures_give_the_same_page():
    assert render(pictures=[example()]) == render(pictures=[example()])


@pytest.mark.parametrize("side", [16, 64, 256])
def test_a_strip_has_the_images_in_a_row(side):
    shades = [10, 20, 30, 35, 40]
    png = draw_strip([np.full((side, side, 3), shade, np.uint8) for shade in shades])
    sheet = decode_rgb(png, Limits(MAX_PIXELS)).rgb
    step = side + max(2, side // 32)
    middle = [sheet[side - 1, step * i + side // 2].tolist() for i in range(len(shades))]
    assert middle == [[shade] * 3 for shade in shades]
    assert sheet.shape[1] == step * len(shades) - (step - side)


def test_the_hole_is_white_in_the_masked_image():
    made = example(side=32)
    masked = np.asarray(Image.open(io.BytesIO(made.images["masked"])))
    assert (masked[4:8, 4:8] == 255).all()
    assert (masked[8:] == 100).all()


def test_large_images_are_compressed_for_the_page_and_exact_in_the_strip():
    noise = np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8)
    made = draw_example(
        noise, np.ones((128, 128), np.uint8), dict.fromkeys(PSNR, noise), rows(), ""
    )
    assert len(made.images["truth"]) < noise.nbytes / 2
    strip = decode_rgb(made.strip, Limits(MAX_PIXELS)).rgb
    assert (strip[:, :128] == noise).all()


def test_the_cost_of_training_is_shown_if_it_is_known():
    trained = stage(summary={"steps": 5000, "gpu_hours": 0.0, "cpu_hours": 1.234})
    assert "Training took 1.23 worker-hours without a GPU for 5,000 steps." in text_of(
        render(chain=[trained, stage()])
    )
    assert "Training took" not in text_of(render())


def sets(**changes):
    methods = {
        method: {"fid": value, "p_ids": 10 + value / 10, "u_ids": 20 + value / 10}
        for method, value in PSNR.items()
    }
    return {"pairs": 4000, "methods": methods, "official": True, "inception": "6726825d"} | changes


def test_fid_and_ids_are_a_table_of_all_pairs_with_the_best_in_bold():
    assert "P-IDS" not in render().partition("How it was measured")[0]
    page = render(report(sets=sets()))
    (table,) = re.findall(r'<table class="sets">.*?</table>', page, re.S)
    assert '<th scope="col">FID</th>' in table
    assert re.findall(r"<b>(.*?)</b>", table) == ["11.95", "21.95", "16.00"]
    assert "are not the published file" not in page
    assert "are fewer than" not in page
    assert Reader(page).open == []


def test_figures_of_other_weights_or_few_pairs_say_so():
    page = text_of(render(report(sets=sets(official=False, inception="a" * 64, pairs=2047))))
    assert f"compare these figures only with others of the same file (SHA-256 {'a' * 64})" in page
    assert "2,047 pairs are fewer than the 2,048 features" in page


def test_without_a_missing_metric_there_is_no_such_list():
    assert "Not computed" not in render(report(not_computed=[]))
