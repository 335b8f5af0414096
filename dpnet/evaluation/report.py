"""The report of an evaluation: one HTML page without scripts, other files or network access."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from data_prep.core.manifest import Manifest
from data_prep.core.text import html_text
from dpnet.evaluation.charts import Points, bins_chart, losses_chart, validation_chart
from dpnet.evaluation.protocol import METHODS, METRICS
from dpnet.evaluation.report_style import CSS

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

STRIP = (
    "truth",
    "masked",
    "dpnet",
    "smooth_fill",
    "telea",
    "navier_stokes",
    "mean_fill",
)  # the images of a row, left to right


STRIP_WORDS = "original, input with the hole, DPNet, smooth fill, Telea, Navier-Stokes, mean fill"


@dataclass(frozen=True)
class PictureRow:
    """One evaluated pair: a strip of images in the order of STRIP, and the hole PSNR by method."""

    png: bytes
    image: str
    mask: str
    ratio_bin: str
    hole_ratio: float
    hole_psnr: Mapping[str, float]

    @property
    def name(self) -> str:
        """Return the name of the strip's file."""
        return f"{self.ratio_bin}-{self.mask}"


def strip(
    truth: NDArray[np.uint8], valid: NDArray[np.uint8], methods: Mapping[str, NDArray[np.uint8]]
) -> bytes:
    """Return a PNG of the images in a row, with transparent gaps between them.

    Args:
        truth: uint8 [H, W, 3].
        valid: uint8 [H, W], 1 = known.
        methods: the composite of each method, uint8 [H, W, 3].
    """
    import numpy as np
    from PIL import Image

    pictures = {"truth": truth, "masked": np.where(valid[..., None] > 0, truth, 255), **methods}
    height, width = valid.shape
    step = width + max(2, width // 32)
    sheet = Image.new("RGBA", (step * len(STRIP) - (step - width), height), (0, 0, 0, 0))
    for number, name in enumerate(STRIP):
        sheet.paste(Image.fromarray(pictures[name].astype(np.uint8)), (step * number, 0))
    file = io.BytesIO()
    sheet.save(file, "PNG")
    return file.getvalue()


def render_report(
    report: Mapping[str, Any],
    pictures: Sequence[PictureRow],
    log: Sequence[Mapping[str, Any]],
    chain: Sequence[Manifest],
) -> str:
    """Return the page.

    Args:
        report: the content of report.json.
        pictures: examples, sorted by ratio bin.
        log: the log of training.
        chain: manifests of the stages that this evaluation is made of. The evaluation's own
            comes last; it has no content digest and no summary yet.
    """
    title = f"DPNet evaluation: {chain[-1].name}"
    sections = [
        _headline(report),
        _section("By size of the hole", _bins_section(report)),
        _section("Training", _training(log)),
        _section("Examples", _pictures(pictures)),
        _section("How it was measured", _protocol(report)),
        _section("Data and model", _provenance(report, chain)),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html_text(title)}</title>\n<style>{CSS}</style>\n</head>\n<body>\n<main>\n"
        f"<h1>{html_text(title)}</h1>\n" + "\n".join(sections) + "\n</main>\n</body>\n</html>\n"
    )


def training_curves(
    log: Sequence[Mapping[str, Any]],
) -> tuple[Points, Points, dict[str, Points]]:
    """Return validation hole PSNR, that of mean fill, and losses by name, each over steps."""
    measured = [record for record in log if record["kind"] == "validation"]
    trained = [record for record in log if record["kind"] == "train"]
    names = sorted({name for record in trained for name in record["losses"]})
    return (
        [(record["step"], record["hole_psnr"]) for record in measured],
        [(record["step"], record["mean_fill_psnr"]) for record in measured],
        {
            name: [(r["step"], r["losses"][name]) for r in trained if name in r["losses"]]
            for name in names
        },
    )


def _headline(report: Mapping[str, Any]) -> str:
    means = report["figures"]["mean_over_bins"]
    methods = report["methods"]
    psnr = {method: means[method]["hole_psnr"] for method in methods}
    tiles = "".join(
        f'<div class="tile {method}"><b>{psnr[method]:.2f}<small> dB</small></b>'
        f"<span>{html_text(name)}</span></div>"
        for method, name in methods.items()
    )
    peers = [
        _compared(psnr["dpnet"] - psnr[method], html_text(methods[method]))
        for method in methods
        if method != "dpnet"
    ]
    against = f"{', '.join(peers[:-1])} and {peers[-1]}"
    return (
        f'<p class="lead">On {report["pairs"]:,} held-out pairs of image and mask, DPNet is'
        f' {against}.</p>\n<div class="tiles">{tiles}</div>\n<p class="note">Hole PSNR uses'
        " only the missing pixels. It is the mean over the bins of hole size. Higher is better.</p>"
    )


def _compared(gain: float, peer: str) -> str:
    name = peer.lower() if peer.endswith(" fill") else peer  # Telea is a name
    if abs(gain) < 0.005:
        return f"level with {name}"
    return f"<b>{abs(gain):.2f} dB {'above' if gain > 0 else 'below'}</b> {name}"


def _bins_section(report: Mapping[str, Any]) -> str:
    bins, methods = report["figures"]["bins"], report["methods"]
    values = {
        method: [
            (v["mean"], v["low"], v["high"])
            for v in (group["methods"][method]["hole_psnr"] for group in bins.values())
        ]
        for method in methods
    }
    names = {_percent(name): group for name, group in bins.items()}
    groups = {**names, "All pairs": report["figures"]["all"]}
    chart = bins_chart(list(names), values, "hole PSNR, dB", methods)
    computed = report["figures"]["all"]["methods"]["dpnet"]
    tables = "\n".join(_table(groups, metric, methods) for metric in METRICS if metric in computed)
    return (
        f'<figure class="chart">{chart}</figure>\n<div class="tables">{tables}</div>\n'
        '<p class="note">Mean and 95 % bootstrap interval. The best mean of a row is bold.'
        f"{_perfect(report)}</p>"
    )


def _percent(name: str) -> str:
    """Return a ratio bin's name in percent: "0.10-0.20" becomes "10–20 %"."""
    low, high = (f"{100 * float(end):.0f}" for end in name.split("-"))
    return f"{low}–{high} %"


def _perfect(report: Mapping[str, Any]) -> str:
    counts = [
        f"{html_text(report['methods'][method])} {count}"
        for method, count in report["perfect"].items()
        if count > 0
    ]
    return f" Holes filled perfectly, counted as 100 dB: {', '.join(counts)}." if counts else ""


def _table(groups: Mapping[str, Any], metric: str, methods: Mapping[str, str]) -> str:
    label, decimals, more = METRICS[metric]
    heading = label[0].upper() + label[1:]
    rows = []
    for name, group in groups.items():
        figures = {method: group["methods"][method][metric] for method in methods}
        best = (max if more else min)(round(f["mean"], decimals) for f in figures.values())
        cells = ""
        for figure in figures.values():
            mean = f"{figure['mean']:.{decimals}f}"
            mean = f"<b>{mean}</b>" if round(figure["mean"], decimals) == best else mean
            interval = f"{figure['low']:.{decimals}f} – {figure['high']:.{decimals}f}"
            cells += f"<td>{mean}<small>{interval}</small></td>"
        rows.append(
            f'<tr><th scope="row">{html_text(name)}</th><td>{group["pairs"]:,}</td>{cells}</tr>'
        )
    heads = "".join(f'<th scope="col">{html_text(name)}</th>' for name in methods.values())
    return (
        f"<table><caption>{html_text(heading)} <small>{'higher' if more else 'lower'} is better"
        f'</small></caption><thead><tr><th scope="col">Hole</th><th scope="col">Pairs</th>{heads}'
        f"</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    )


def _training(log: Sequence[Mapping[str, Any]]) -> str:
    dpnet, mean_fill, losses = training_curves(log)
    charts = []
    if dpnet:
        charts.append(("Hole PSNR on validation images", validation_chart(dpnet, mean_fill)))
    if losses:
        charts.append(("Losses", losses_chart(losses)))
    if not charts:
        return "<p>This run has no log of its training.</p>"
    figures = "".join(
        f'<figure class="chart"><figcaption>{html_text(caption)}</figcaption>{chart}</figure>'
        for caption, chart in charts
    )
    return f'<div class="charts">{figures}</div>'


def _pictures(pictures: Sequence[PictureRow]) -> str:
    if not pictures:
        return "<p>The settings ask for no examples.</p>"
    names = [METHODS.get(column, column.capitalize()) for column in STRIP]
    heads = "".join(f"<span>{html_text(name)}</span>" for name in names)
    parts, current = [f'<div class="strip heads">{heads}</div>'], ""
    for row in pictures:
        if row.ratio_bin != current:
            current = row.ratio_bin
            parts.append(f"<h3>{_percent(current)} hole</h3>")
        data = base64.b64encode(row.png).decode()
        label = f"{', '.join(names)}: {row.image} under {row.mask}"
        psnr = "".join(
            f"<span>{row.hole_psnr[c]:.2f} dB</span>"
            if c in row.hole_psnr
            else f"<span>{f'{100 * row.hole_ratio:.0f} % hole' if c == 'masked' else ''}</span>"
            for c in STRIP
        )
        parts.append(
            f'<figure class="row"><img src="data:image/png;base64,{data}" alt="{html_text(label)}"'
            f' title="{html_text(row.image)}, {html_text(row.mask)}">'
            f'<figcaption class="strip">{psnr}</figcaption></figure>'
        )
    return "\n".join(parts)


def _protocol(report: Mapping[str, Any]) -> str:
    definitions = "".join(
        f"<dt>{html_text(name)}</dt><dd>{html_text(text)}</dd>"
        for name, text in report["protocol"].items()
    )
    missing = "".join(
        f"<dt>{html_text(item['metric'])}</dt><dd>{html_text(item['reason'])}</dd>"
        for item in report["not_computed"]
    )
    return f"<dl>{definitions}</dl>\n<h3>Not computed</h3>\n<dl>{missing}</dl>"


_SHOWN = ("settings", "sources", "summary")  # of a stage's manifest


def _provenance(report: Mapping[str, Any], chain: Sequence[Manifest]) -> str:
    rows = "".join(
        f'<tr><th scope="row">{html_text(stage.stage)}</th><td>{html_text(stage.folder)}</td>'
        f"<td><code>{html_text(stage.request_digest[:12])}</code></td>"
        f"<td><code>{html_text(stage.content_digest[:12]) or '–'}</code></td></tr>"
        for stage in chain
    )
    details = "".join(
        f"<details><summary>{html_text(stage.stage)}: settings and results</summary><pre>"
        + html_text(json.dumps({k: v for k, v in stage.to_json().items() if k in _SHOWN}, indent=1))
        + "</pre></details>"
        for stage in chain
        if stage.content_digest
    )
    return (
        '<table class="left"><thead><tr><th scope="col">Stage</th><th scope="col">Folder</th>'
        '<th scope="col">Request</th><th scope="col">Content</th></tr></thead>'
        f"<tbody>{rows}</tbody></table>\n<p>Pairs digest: <code>{report['pairs_digest']}</code></p>"
        f'\n{details}\n<p class="note"><code>dpnet verify</code> follows this chain and checks'
        " every hash.</p>"
    )


def _section(title: str, body: str) -> str:
    return f"<section>\n<h2>{html_text(title)}</h2>\n{body}\n</section>"
