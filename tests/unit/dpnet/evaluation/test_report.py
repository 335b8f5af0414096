"""The report: a complete HTML page that needs nothing else."""

import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest

from data_prep.core.manifest import Manifest
from data_prep.pictures.decoding import decode_rgb
from data_prep.pictures.limits import MAX_PIXELS, Limits
from dpnet.evaluation.protocol import METHODS, NO_LPIPS_WEIGHTS, PROTOCOL, not_computed
from dpnet.evaluation.report import STRIP, PictureRow, render_report, strip, training_curves
from dpnet.evaluation.report_style import CSS

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
    {"kind": "validation", "step": 50, "hole_psnr": 13.0, "mean_fill_psnr": 12.0},
]


def group(psnr=PSNR, pairs=4):
    def figure(mean):
        return {"mean": mean, "low": mean - 0.5, "high": mean + 0.5}

    methods = {
        method: {
            "hole_psnr": figure(value),
            "psnr": figure(value + 6),
            "ssim": figure(0.9),
            "l1": figure(30 - value),
        }
        for method, value in psnr.items()
    }
    return {"pairs": pairs, "methods": methods}


def report(psnr=PSNR, **changes):
    means = {method: {"hole_psnr": value} for method, value in psnr.items()}
    bins = {"0.01-0.10": group(psnr), "0.10-0.20": group(psnr)}
    return {
        "pairs": 1234,
        "pairs_digest": "d" * 64,
        "methods": METHODS,
        "figures": {"bins": bins, "all": group(psnr, 1234), "mean_over_bins": means},
        "perfect": dict.fromkeys(METHODS, 0),
        "protocol": PROTOCOL,
        "not_computed": not_computed(NO_LPIPS_WEIGHTS),
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


def row(**changes):
    valid = np.ones((16, 16), np.uint8)
    valid[4:8, 4:8] = 0
    truth = np.full((16, 16, 3), 100, np.uint8)
    png = strip(truth, valid, dict.fromkeys(METHODS, truth))
    fields = {"image": "test-1", "mask": "eval-2", "ratio_bin": "0.01-0.10", "hole_ratio": 0.0625}
    return PictureRow(**({"png": png, "hole_psnr": PSNR} | fields | changes))


def render(figures=None, pictures=(), log=LOG, chain=None):
    return render_report(figures or report(), list(pictures), log, chain or [stage()])


class Reader(HTMLParser):
    """Collects elements, and checks that they are closed in order."""

    EMPTY = ("meta", "img", "br")

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
    assert Reader(render(pictures=[row()])).open == []


def test_the_page_needs_no_other_file_and_no_network():
    page = render(pictures=[row()])
    elements = Reader(page).elements
    assert not [tag for tag, _ in elements if tag in ("script", "link", "iframe", "object")]
    for _, attributes in elements:
        for name in ("src", "href", "xlink:href"):
            assert attributes.get(name, "#").startswith(("data:image/png;base64,", "#"))
    assert "@import" not in page
    assert not re.search(r"url\((?!#)", page)


def test_the_first_sentence_says_where_another_method_is_better():
    text = text_of(render())
    assert "On 1,234 held-out pairs" in text
    assert (
        "DPNet is 0.25 dB above smooth fill, 1.25 dB below Telea, 0.50 dB"
        " below Navier-Stokes and 2.25 dB above mean fill" in text
    )


def test_the_best_figure_of_a_row_is_bold_also_if_lower_is_better():
    page = render()
    assert "<b>19.50</b>" in page  # Telea's hole PSNR
    assert "<b>10.50</b>" in page  # Telea's L1, the lowest
    assert "<b>18.25</b>" not in page.partition("<table>")[2]


def test_the_tables_show_every_bin_with_its_interval():
    text = text_of(render())
    assert "1–10 %" in text
    assert "10–20 %" in text
    assert "17.75 – 18.75" in text


def test_perfect_holes_are_counted():
    perfect = {**dict.fromkeys(METHODS, 0), "dpnet": 3}
    assert "counted as 100 dB: DPNet 3" in text_of(render(report(perfect=perfect)))
    assert "counted as 100 dB:" not in text_of(render())


def test_each_image_of_a_row_has_a_column_of_its_own_under_its_heading():
    assert f".strip {{ display: grid; grid-template-columns: repeat({len(STRIP)}, 1fr)" in CSS
    heads = re.search(r'<div class="strip heads">(.*?)</div>', render(pictures=[row()]))
    assert heads[1].count("<span>") == len(STRIP)


def test_metrics_that_were_not_computed_are_listed_with_a_reason():
    text = text_of(render())
    for item in not_computed(NO_LPIPS_WEIGHTS):
        assert item["metric"] in text
        assert item["reason"] in text


def test_names_and_settings_cannot_add_markup():
    evil = "<script>alert(1)</script>&\"'"
    chain = [stage(evil, folder=evil, stage=evil, settings={"a": evil})]
    page = render(report(), [row(image=evil, mask=evil)], LOG, chain)
    assert "<script" not in page
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
    dpnet, mean_fill, losses = training_curves(LOG)
    assert dpnet == [(0, 10.0), (50, 13.0)]
    assert mean_fill == [(0, 12.0), (50, 12.0)]
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
    assert render(pictures=[row()]) == render(pictures=[row()])


@pytest.mark.parametrize("side", [16, 64, 256])
def test_a_strip_has_the_images_in_a_row(side):
    valid = np.ones((side, side), np.uint8)
    valid[: side // 2] = 0
    shades = {"dpnet": 20, "smooth_fill": 25, "telea": 30, "navier_stokes": 35, "mean_fill": 40}
    methods = {name: np.full((side, side, 3), shade, np.uint8) for name, shade in shades.items()}
    png = strip(np.full((side, side, 3), 10, np.uint8), valid, methods)
    sheet = decode_rgb(png, Limits(MAX_PIXELS)).rgb
    step = side + max(2, side // 32)
    middle = [tuple(sheet[side - 1, step * i + side // 2]) for i in range(7)]
    assert [shade[0] for shade in middle] == [10, 10, 20, 25, 30, 35, 40]
    assert (sheet[0, step + side // 2] == 255).all()  # the hole is white
