"""The pairs of a report as cards, each with a slider, its images and its values."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from data_prep.core.text import html_text
from dpnet.evaluation.protocol import METRICS, OURS

if TYPE_CHECKING:
    from dpnet.evaluation.examples import Example

TRUTH, MASKED, ERROR = "truth", "masked", "error"
_MARKS = {"best": "Best", "median": "Median", "worst": "Worst"}
_SORTS = {  # data attribute without "data-": label
    "order": "the order of the report",
    "gain": "gain over the smooth fill",
    **{name: metric.label for name, metric in METRICS.items()},
    "hole": "size of the hole",
}


def render_examples(examples: Sequence[Example], methods: Mapping[str, str]) -> str:
    """Return the cards with the controls that sort them.

    Args:
        examples: the pairs in the order of the page.
        methods: labels of the methods.
    """
    if not examples:
        return "<p>The settings ask for no examples.</p>"
    known = examples[0].values[OURS]
    hidden = [name for name in METRICS if known.get(name) is None]
    options = "".join(
        f'<option value="{name}">{html_text(label)}</option>'
        for name, label in _SORTS.items()
        if name not in hidden
    )
    cards = "\n".join(_card(each, number, methods) for number, each in enumerate(examples))
    return (
        '<p class="note">Best, median and worst are by DPNet\'s gain over the smooth fill in hole'
        " PSNR. The other pairs are the first of each bin. The slider goes from the input to the"
        " result of DPNet. An error map shows the mean absolute difference of DPNet and truth:"
        " black is 0, white is 64 levels or more.</p>\n"
        '<p class="sort" hidden><label>Sort by <select id="sort-metric">'
        f'{options}</select></label> <label>first <select id="sort-order">'
        '<option value="low">the lowest</option><option value="high">the highest</option>'
        f'</select></label></p>\n<div class="pairs">\n{cards}\n</div>'
    )


def _card(example: Example, number: int, methods: Mapping[str, str]) -> str:
    ours = example.values[OURS]
    sorts = {"order": float(number), "gain": example.gain, "hole": example.hole_ratio}
    sorts |= {name: ours.get(name) for name in METRICS}
    data = " ".join(
        f'data-{name}="{"" if value is None else format(value, ".6g")}"'
        for name, value in sorts.items()
    )
    mark = _MARKS.get(example.mark, "")
    badge = f'<b class="mark {example.mark}">{mark}</b> ' if mark else ""
    values = ", ".join(
        f"{html_text(metric.label.partition(',')[0])} {ours[name]:.{metric.digits}f}"
        for name, metric in METRICS.items()
        if ours.get(name) is not None
    )
    gain = "" if example.gain is None else f", {example.gain:+.2f} dB to the smooth fill"
    label = f"{example.image} under {example.mask}"
    return (
        f'<article class="pair" {data}><header>{badge}{100 * example.hole_ratio:.0f} % hole'
        f"<small>{html_text(label)}</small></header>"
        f'<div class="slider">{_image(example, OURS, "DPNet")}'
        f'<div class="before">{_image(example, MASKED, "input with the hole")}</div>'
        '<input type="range" min="0" max="100" value="50" hidden'
        f' aria-label="From the input to DPNet: {html_text(label)}"></div>'
        f'<p class="note">{values}{gain}</p>'
        f'<div class="thumbs">{"".join(_thumbs(example, methods))}</div></article>'
    )


def _thumbs(example: Example, methods: Mapping[str, str]) -> list[str]:
    """Return the images of a card, each with its name and hole PSNR."""
    names = {TRUTH: "Truth", ERROR: "DPNet's error", **methods}
    found = []
    for name, label in names.items():
        psnr = example.values[name].get("hole_psnr") if name in example.values else None
        value = f"<small>{psnr:.2f} dB</small>" if psnr is not None else ""
        found.append(
            f"<figure>{_image(example, name, label)}<figcaption>{html_text(label)}{value}"
            "</figcaption></figure>"
        )
    return found


def _image(example: Example, name: str, label: str) -> str:
    data = base64.b64encode(example.images[name]).decode()
    text = html_text(f"{label}: {example.image} under {example.mask}")
    return f'<img src="data:image/webp;base64,{data}" alt="{text}">'
