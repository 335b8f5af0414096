"""The report of an evaluation: one HTML page that needs no other file and no network."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from data_prep.core.manifest import Manifest
from data_prep.core.text import html_text
from dpnet.evaluation.charts import (
    Points,
    bins_chart,
    colours_of,
    losses_chart,
    validation_chart,
)
from dpnet.evaluation.protocol import (
    METRICS,
    OURS,
    SET_METRICS,
    Metric,
    difference_text,
    set_figures,
    set_notes,
    verdict,
)
from dpnet.evaluation.report_examples import render_examples
from dpnet.evaluation.report_script import POLICY, SCRIPT
from dpnet.evaluation.report_style import CSS

if TYPE_CHECKING:
    from dpnet.evaluation.examples import Example

# What the strips in pictures/ show; other models come after DPNet.
STRIP_WORDS = (
    "original, input with the hole, DPNet, other models if there are any, smooth fill, Telea,"
    " Navier-Stokes, mean fill, DPNet's error"
)


def render_report(
    report: Mapping[str, Any],
    examples: Sequence[Example],
    log: Sequence[Mapping[str, Any]],
    chain: Sequence[Manifest],
) -> str:
    """Return the page.

    Args:
        report: the content of report.json.
        examples: pairs to show, in their order.
        log: the log of training.
        chain: manifests of the stages that this evaluation is made of. The evaluation's own
            comes last; it has no content digest and no summary yet.
    """
    title = f"DPNet evaluation: {chain[-1].name}"
    sections = [
        _headline(report),
        _section("DPNet against each method", _paired_section(report)),
        _section("By size of the hole", _bins_section(report)),
        *_sets_section(report),
        _section("Pairs", render_examples(examples, report["methods"])),
        _section("Training", _training(log)),
        _section("How it was measured", _protocol(report)),
        _section("Data, model and cost", _provenance(report, chain)),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        f"<title>{html_text(title)}</title>\n<style>{CSS}</style>\n</head>\n<body>\n<main>\n"
        f"<h1>{html_text(title)}</h1>\n"
        + "\n".join(sections)
        + f"\n</main>\n<script>{SCRIPT}</script>\n</body>\n</html>\n"
    )


def training_curves(
    log: Sequence[Mapping[str, Any]],
) -> tuple[dict[str, Points], dict[str, Points]]:
    """Return validation hole PSNR by method and losses by name, each over steps.

    Logs of earlier versions have no smooth fill.
    """
    measured = [record for record in log if record["kind"] == "validation"]
    trained = [record for record in log if record["kind"] == "train"]
    names = sorted({name for record in trained for name in record["losses"]})
    keys = {
        OURS: "hole_psnr",
        "smooth_fill": "smooth_fill_psnr",
        "mean_fill": "mean_fill_psnr",
    }
    curves = {
        method: [(record["step"], record[key]) for record in measured if key in record]
        for method, key in keys.items()
    }
    return (
        {method: points for method, points in curves.items() if points},
        {
            name: [(r["step"], r["losses"][name]) for r in trained if name in r["losses"]]
            for name in names
        },
    )


def _headline(report: Mapping[str, Any]) -> str:
    means, methods = report["figures"]["mean_over_bins"], report["methods"]
    tiles = "".join(
        f'<div class="tile {html_text(method)}" style="border-color: {colour}">'
        f"<b>{means[method]['hole_psnr']:.2f}<small> dB</small></b>"
        f"<span>{html_text(methods[method])}</span>{_small_values(means[method])}</div>"
        for method, colour in colours_of(methods).items()
    )
    return (
        f'<p class="lead"><b>{html_text(verdict(report))}</b> Measured on {report["pairs"]:,}'
        f' held-out pairs of image and mask.</p>\n<div class="tiles">{tiles}</div>\n'
        '<p class="note">Hole PSNR uses only the missing pixels. Every figure is the mean over'
        f" the bins of hole size.{_uncounted(report)}</p>"
    )


def _small_values(means: Mapping[str, float]) -> str:
    """Return SSIM and LPIPS of a method below its tile's name."""
    shown = [
        f"{METRICS[name].label} {means[name]:.{METRICS[name].digits}f}"
        for name in ("ssim", "lpips")
        if name in means
    ]
    return "".join(f'<small class="values">{text}</small>' for text in shown)


def _uncounted(report: Mapping[str, Any]) -> str:
    empty = report["empty_holes"]
    return f" Pairs with an empty hole, without a hole PSNR: {empty:,}." if empty else ""


def _paired_section(report: Mapping[str, Any]) -> str:
    """Return a table of DPNet's paired differences to each method, with a word for each."""
    paired, methods = report["figures"]["paired"], report["methods"]
    metrics = [name for name in METRICS if any(name in own for own in paired.values())]
    rows = "".join(
        f'<tr><th scope="row">{html_text(methods[method])}</th>'
        + "".join(_difference(own[name], METRICS[name]) for name in metrics)
        + "</tr>"
        for method, own in paired.items()
    )
    heads = "".join(f'<th scope="col">{html_text(METRICS[name].label)}</th>' for name in metrics)
    return (
        '<div class="wide"><table class="paired"><thead><tr><th scope="col">DPNet minus</th>'
        f"{heads}</tr></thead><tbody>{rows}</tbody></table></div>\n"
        '<p class="note">Mean over the bins of the differences on the same pairs, with its 95 %'
        " bootstrap interval. Better and worse are said only where the interval does not hold 0."
        "</p>"
    )


def _difference(figure: Mapping[str, float], metric: Metric) -> str:
    sign = 1 if metric.higher_is_better else -1
    ends = sorted(sign * figure[end] for end in ("low", "high"))
    word = "better" if ends[0] > 0 else "worse" if ends[1] < 0 else "level"
    mean, _, interval = difference_text(figure, metric.digits).partition(" ")
    return f'<td class="{word}">{mean} <b>{word}</b><small>{interval.strip("()")}</small></td>'


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


def _sets_section(report: Mapping[str, Any]) -> list[str]:
    """Return a table of FID, P-IDS and U-IDS, if they were computed."""
    found, methods = set_figures(report), report["methods"]
    if not found:
        return []
    best = {
        name: (max if metric.higher_is_better else min)(
            round(own[name], metric.digits) for own in found.values()
        )
        for name, metric in SET_METRICS.items()
    }
    rows = "".join(
        f'<tr><th scope="row">{html_text(methods[method])}</th>'
        + "".join(
            _best_cell(own[name], metric.digits, best[name]) for name, metric in SET_METRICS.items()
        )
        + "</tr>"
        for method, own in found.items()
    )
    heads = "".join(f'<th scope="col">{m.label}</th>' for m in SET_METRICS.values())
    notes = "".join(f'<p class="note">{html_text(note)}</p>\n' for note in set_notes(report))
    body = (
        '<div class="wide"><table class="sets"><thead><tr><th scope="col">Method</th>'
        f"{heads}</tr></thead><tbody>{rows}</tbody></table></div>\n"
        '<p class="note">The composites of all pairs together against their truths. A lower FID is'
        " better, and higher P-IDS and U-IDS are. The best value of a column is bold.</p>\n"
        f"{notes}"
    )
    return [_section("All pairs together: FID, P-IDS and U-IDS", body)]


def _best_cell(value: float, digits: int, best: float) -> str:
    text = f"{value:.{digits}f}"
    return f"<td><b>{text}</b></td>" if round(value, digits) == best else f"<td>{text}</td>"


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
        f'<div class="wide"><table><caption>{html_text(heading)} <small>'
        f"{'higher' if more else 'lower'} is better"
        f'</small></caption><thead><tr><th scope="col">Hole</th><th scope="col">Pairs</th>{heads}'
        f"</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _training(log: Sequence[Mapping[str, Any]]) -> str:
    curves, losses = training_curves(log)
    charts = []
    if curves:
        charts.append(("Hole PSNR on validation images", validation_chart(curves)))
    if losses:
        charts.append(("Losses", losses_chart(losses)))
    if not charts:
        return "<p>This run has no log of its training.</p>"
    figures = "".join(
        f'<figure class="chart"><figcaption>{html_text(caption)}</figcaption>{chart}</figure>'
        for caption, chart in charts
    )
    return f'<div class="charts">{figures}</div>'


def _protocol(report: Mapping[str, Any]) -> str:
    definitions = "".join(
        f"<dt>{html_text(name)}</dt><dd>{html_text(text)}</dd>"
        for name, text in report["protocol"].items()
    )
    missing = "".join(
        f"<dt>{html_text(item['metric'])}</dt><dd>{html_text(item['reason'])}</dd>"
        for item in report["not_computed"]
    )
    others = f"\n<h3>Not computed</h3>\n<dl>{missing}</dl>" if missing else ""
    return f"<dl>{definitions}</dl>{others}"


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
        '<div class="wide"><table class="left"><thead><tr><th scope="col">Stage</th>'
        '<th scope="col">Folder</th><th scope="col">Request</th>'
        '<th scope="col">Content</th></tr></thead>'
        f"<tbody>{rows}</tbody></table></div>\n{_cost(chain)}"
        f"<p>Pairs digest: <code>{report['pairs_digest']}</code></p>\n{_compared_models(report)}"
        f'\n{details}\n<p class="note"><code>dpnet verify</code> follows this chain and checks'
        " every hash.</p>"
    )


def _cost(chain: Sequence[Manifest]) -> str:
    """Return what training took; runs of earlier versions did not record it."""
    found = [stage.summary for stage in chain if "cpu_hours" in stage.summary]
    if not found:
        return ""
    summary = found[-1]
    hours = [
        f"{summary[key]:.2f} {name}"
        for key, name in (("gpu_hours", "GPU-hours"), ("cpu_hours", "worker-hours without a GPU"))
        if summary.get(key)
    ]
    text = " and ".join(hours) or "under 0.01 hours"
    return f"<p>Training took {text} for {summary['steps']:,} steps.</p>\n"


def _compared_models(report: Mapping[str, Any]) -> str:
    versions = report.get("versions", {})
    rows = "".join(
        f"<dt>{html_text(f'{name} ({versions[name]})' if name in versions else name)}</dt>"
        f"<dd><code>{html_text(digest)}</code></dd>"
        for name, digest in report["compared"].items()
    )
    return f"<h3>Digests of the results of other models</h3><dl>{rows}</dl>" if rows else ""


def _section(title: str, body: str) -> str:
    return f"<section>\n<h2>{html_text(title)}</h2>\n{body}\n</section>"
