"""The summary of a pipeline run: JSON values, text of at most 100 columns, and Markdown."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import sys
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from data_prep.core.digest import SHORT
from data_prep.core.errors import PipelineError
from data_prep.core.manifest import StageRef
from data_prep.core.paths import mlflow_uri
from data_prep.core.record import parse_json
from data_prep.core.storage.open import open_store
from data_prep.core.storage.store import Store
from data_prep.core.text import (
    aligned_table,
    duration,
    markdown_code,
    markdown_table,
    markdown_text,
    printable,
)
from dpnet.evaluation import protocol
from dpnet.model_store.records import CHAMPION
from dpnet.pipeline.cost import hours_text
from dpnet.tracking.mlflow_database import mlflow_database

# DPNet and the strongest simple methods. The mean fill is in the report only: anything beats it.
METHODS = {name: protocol.METHODS[name] for name in ("dpnet", "smooth_fill", "telea")}
METRICS = {name: protocol.METRICS[name] for name in protocol.SUMMARY}
_WIDTH = 100  # columns of the text
_IN_JSON = (*METRICS, "l1")
_COLUMNS = {"dpnet": "DPNet", "smooth_fill": "smooth", "telea": "Telea"}  # short, for a terminal

Summary = dict[str, Any]


def summarize(name: str, store: Store, refs: Sequence[StageRef], seconds: float) -> Summary:
    """Return the summary of a run of all five stages as JSON values.

    Args:
        name: name of the config.
        store: the root; the evaluation's report.json is read from it.
        refs: references of the five stages.
        seconds: duration of the run.
    """
    by_stage = {ref.stage: ref for ref in refs}
    evaluation = by_stage["evaluate"].folder
    with _undamaged(store, evaluation) as report:
        figures = _figures(report)
    return {
        "name": name,
        "root": store.label,
        "stages": [ref.to_json() for ref in refs],
        **figures,
        "report": f"{store.label}/{evaluation}/report.html",
        "registered": by_stage["register"].summary,
        "seconds": round(seconds, 1),
    }


def _figures(report: Mapping[str, Any]) -> Summary:
    """Return the figures of every method, and DPNet's paired differences, by metric."""
    found = report["figures"]
    over_bins, paired = found["mean_over_bins"], found["paired"]

    def means(group: Mapping[str, Any]) -> Summary:
        """Return the means of a group; a metric that was not computed is None."""
        return {
            method: {
                metric: float(values[metric]["mean"]) if metric in values else None
                for metric in _IN_JSON
            }
            for method, values in group["methods"].items()
        }

    return {
        "pairs": report["pairs"],
        "bins": {
            hole: {"pairs": group["pairs"], **means(group)} for hole, group in found["bins"].items()
        },
        "mean_over_bins": {
            method: {
                metric: float(values[metric]) if metric in values else None for metric in _IN_JSON
            }
            for method, values in over_bins.items()
        },
        "paired": {
            method: {
                metric: {end: float(values[metric][end]) for end in ("mean", "low", "high")}
                for metric in METRICS
                if metric in values
            }
            for method, values in paired.items()
        },
        "sets": protocol.set_figures(report),
        "set_notes": protocol.set_notes(report),
        "verdict": protocol.verdict(report),
        "not_computed": {
            str(each["metric"]): str(each["reason"]) for each in report["not_computed"]
        },
        "smooth_fill_psnr": float(over_bins["smooth_fill"]["hole_psnr"]),
    }


@contextmanager
def _undamaged(store: Store, evaluation: str) -> Iterator[dict[str, Any]]:
    """Read the report of an evaluation, and raise PipelineError if it lacks what is read inside."""
    key = f"{evaluation}/report.json"
    try:
        yield parse_json(store.read(key))
    except FileNotFoundError:
        problem = "is missing"
    except (ValueError, KeyError, TypeError, AttributeError):
        problem = "was altered"
    else:
        return
    raise PipelineError(
        f"{store.label}/{key} {problem}: restore it, or delete {store.label}/{evaluation} and run"
        " the same command again."
    )


def as_text(summary: Summary, again: str) -> str:
    """Return the summary for a terminal; `again` is the command that repeats the run."""
    registered = summary["registered"]
    model = f"{registered['model']} version {registered['version']}, {registered['alias']}"
    lines = [
        printable(f"{summary['name']} in {summary['root']}"),
        "",
        stages_text(summary["stages"]),
        "",
        figures_text(summary),
        "",
        *paired_text(summary["paired"]),
        *sets_text(summary),
        *(
            part
            for line in (*summary["set_notes"], *_why_no_lpips(summary))
            for part in textwrap.wrap(line, _WIDTH)
        ),
        summary["verdict"],
        "",
        printable(f"report      {summary['report']}"),
        printable(f"registered  {model}: {registered['reason']}"),
        *_training_hours(summary["stages"]),
        f"total       {duration(summary['seconds'])}",
        "",
        *_next(summary, again),
    ]
    return "\n".join(lines)


def as_markdown(
    name: str, store: Store, refs: Sequence[StageRef], cost: str, links: Mapping[str, str]
) -> str:
    """Return the summary of a run of some stages for the Prefect UI.

    Args:
        name: name of the config.
        store: the root.
        refs: references of the stages that ran or were skipped.
        cost: cost of training in words; "" if it is unknown.
        links: paths or URLs by their titles.
    """
    lines = [f"**{markdown_text(name)}** in {markdown_code(store.label)}", ""]
    lines += markdown_table(
        ["stage", "state", "time", "digest", "contains", "output"],
        [
            [
                ref.stage,
                "skipped" if ref.skipped else "done",
                duration(ref.seconds),
                markdown_code(ref.content_digest[:SHORT]),
                markdown_text(holds(ref.stage, ref.summary)),
                markdown_code(ref.folder.replace("|", "\\|")),
            ]
            for ref in refs
        ],
    )
    by_stage = {ref.stage: ref for ref in refs}
    if cost:
        lines += ["", f"Cost of training: {cost}."]
    if registered := by_stage.get("register"):
        s = registered.summary
        sentence = f"{s['model']} version {s['version']}, {s['alias']}: {s['reason']}"
        lines += ["", markdown_text(sentence)]
    if links:
        lines += ["", *(f"* {what}: {_link(where)}" for what, where in links.items())]
    if evaluation := by_stage.get("evaluate"):
        with _undamaged(store, evaluation.folder) as report:
            figures = _figures(report)
            lines += ["", f"**{markdown_text(figures['verdict'])}**", ""]
            lines += [*_paired_table(figures["paired"]), "", *_figures_tables(figures)]
            lines += _sets_table(figures["sets"])
            lines += [
                markdown_text(line) for line in (*figures["set_notes"], *_why_no_lpips(figures))
            ]
    return "\n".join(lines)


def _figures_tables(figures: Mapping[str, Any]) -> list[str]:
    """Return a table for each computed metric: rows are bins of hole ratio, columns are methods."""
    lines: list[str] = []
    for metric, (title, digits, _) in _computed(figures).items():
        rows = [
            [hole, str(group["pairs"]), *(f"{group[m][metric]:.{digits}f}" for m in METHODS)]
            for hole, group in figures["bins"].items()
        ]
        mean = figures["mean_over_bins"]
        rows.append(["mean", "", *(f"{mean[m][metric]:.{digits}f}" for m in METHODS)])
        lines += markdown_table([f"{title}, by hole", "pairs", *METHODS.values()], rows)
        lines.append("")
    return lines


def _computed(figures: Mapping[str, Any]) -> dict[str, protocol.Metric]:
    """Return the metrics of a summary that were computed."""
    ours = figures["mean_over_bins"][protocol.OURS]
    return {name: metric for name, metric in METRICS.items() if ours[name] is not None}


def _paired_cells(paired: Mapping[str, Any], method: str) -> list[str]:
    """Return DPNet's difference to a method in each metric of the summary that was computed."""
    return [
        protocol.difference_text(paired[method][name], metric.digits)
        for name, metric in METRICS.items()
        if name in paired[method]
    ]


def _paired_heading(paired: Mapping[str, Any]) -> list[str]:
    labels = [m.label for name, m in METRICS.items() if name in paired["smooth_fill"]]
    return ["DPNet minus", *labels]


def _paired_table(paired: Mapping[str, Any]) -> list[str]:
    rows = [[METHODS[m], *_paired_cells(paired, m)] for m in METHODS if m in paired]
    return markdown_table(_paired_heading(paired), rows)


def paired_text(paired: Mapping[str, Any]) -> list[str]:
    """Return a table of DPNet's paired differences to the strongest simple methods."""
    rows = [_paired_heading(paired)]
    rows += [[METHODS[m], *_paired_cells(paired, m)] for m in METHODS if m in paired]
    sides = "<" + ">" * (len(rows[0]) - 1)
    note = "(mean over the bins of the differences on the same pairs, with its 95 % interval)"
    return [*aligned_table(rows, sides), note]


def _sets_rows(sets: Mapping[str, Any]) -> list[list[str]]:
    """Return FID, P-IDS and U-IDS of DPNet and the strongest simple methods."""
    return [
        [METHODS[m], *(f"{sets[m][k]:.{o.digits}f}" for k, o in protocol.SET_METRICS.items())]
        for m in METHODS
        if m in sets
    ]


_SETS_HEADING = ["all pairs together", *(m.label for m in protocol.SET_METRICS.values())]


def sets_text(summary: Summary) -> list[str]:
    """Return a table of FID, P-IDS and U-IDS, if they were computed."""
    if not summary["sets"]:
        return []
    return ["", *aligned_table([_SETS_HEADING, *_sets_rows(summary["sets"])], "<>>>")]


def _sets_table(sets: Mapping[str, Any]) -> list[str]:
    return [*markdown_table(_SETS_HEADING, _sets_rows(sets)), ""] if sets else []


def _why_no_lpips(summary: Mapping[str, Any]) -> list[str]:
    """Return a line that says why there is no LPIPS, if there is none."""
    reason = summary["not_computed"].get("LPIPS")
    return [f"LPIPS is not computed: {reason}"] if reason else []


def _link(where: str) -> str:
    if where.startswith("http") and not re.search(r"[\s()<>]", where):
        return f"[{markdown_text(where)}]({printable(where)})"
    return markdown_code(where)


def stages_text(stages: Iterable[Mapping[str, Any]]) -> str:
    """Return a table with one row for each stage."""
    rows = [("stage", "", "time", "output", "digest", "contains")]
    for stage in stages:
        rows.append(
            (
                stage["stage"],
                "skipped" if stage["skipped"] else "done",
                f"{stage['seconds']:.1f} s",
                stage["folder"],
                stage["content_digest"][:SHORT],
                holds(stage["stage"], stage["summary"]),
            )
        )
    return "\n".join(aligned_table(rows, "<<><<<"))


def holds(stage: str, summary: Mapping[str, Any]) -> str:
    """Return in a few words what a stage has made."""
    match stage:
        case "images" | "masks":
            samples = sum(split["samples"] for split in summary["splits"].values())
            failed = summary.get("failed", 0)
            return f"{samples} {stage}" + (f", {failed} failed" if failed else "")
        case "train":
            resumed = summary["resumed_from"]
            return f"{summary['steps']} steps" + (f", resumed at {resumed}" if resumed else "")
        case "evaluate":
            speed = summary.get("pairs_per_second")  # of older versions there is none
            return f"{summary['pairs']} pairs" + (f", {speed:.3g}/s" if speed else "")
        case _:
            return f"version {summary['version']}"


def _training_hours(stages: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    """Yield a line about the hours of training; older versions did not record them."""
    for stage in stages:
        summary = stage["summary"]
        if stage["stage"] == "train" and "gpu_hours" in summary:
            yield f"training    {hours_text(summary['gpu_hours'], summary['cpu_hours'])}"


def figures_text(summary: Summary) -> str:
    """Return a table of every metric and method, with one row for each bin of hole ratio.

    A metric that was not computed has dashes.
    """
    width = max(map(len, _COLUMNS.values()))
    group = len(METHODS) * width + 2 * (len(METHODS) - 1)
    heading = "   ".join(f"{title:^{group}}" for title, _, _ in METRICS.values())
    columns = "   ".join("  ".join(f"{_COLUMNS[m]:>{width}}" for m in METHODS) for _ in METRICS)
    lines = [f"{'':<16}   {heading}".rstrip(), f"{'hole':<9}  {'pairs':>5}   {columns}"]
    rows = [(hole, str(row["pairs"]), row) for hole, row in summary["bins"].items()]
    rows.append(("mean", "", summary["mean_over_bins"]))
    for hole, pairs, row in rows:
        cells = "   ".join(
            "  ".join(f"{_cell(row[m][k], digits):>{width}}" for m in METHODS)
            for k, (_, digits, _) in METRICS.items()
        )
        lines.append(f"{hole:<9}  {pairs:>5}   {cells}")
    return "\n".join(lines)


def _cell(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _next(summary: Summary, again: str) -> list[str]:
    """Return the commands that people may type next, with paths that work here."""
    root = _short_path(summary["root"])
    steps = next(s["summary"]["steps"] for s in summary["stages"] if s["stage"] == "train")
    commands = [
        (f"dpnet inpaint PHOTO MASK -o out.png --root {root}", "fill the white part of MASK"),
        (f"dpnet serve --root {root}", "paint holes in the browser"),
        (f"dpnet verify {root}", "check every file"),
        (f"{again} --set train.steps={5 * steps}", "train longer"),
    ]
    if database := mlflow_database(open_store(summary["root"])):
        uri = mlflow_uri(_short_path(str(database.parent)))
        commands.append((f"mlflow ui --backend-store-uri {uri}", "show the registry"))
    return next_text(commands)


def next_text(commands: Iterable[tuple[str, str]]) -> list[str]:
    """Return lines with commands that people may type next, each with what it does."""
    at = "" if shutil.which("dpnet") else f"{_short_path(str(Path(sys.executable).parent))}/"
    return ["next:", *(printable(f"  {at}{command}  # {what}") for command, what in commands)]


def registered_text(summary: Mapping[str, Any], root: str) -> list[str]:
    """Return lines about a registration: champion or challenger, why, and what to do next.

    Args:
        summary: of the register stage.
        root: path or URI of the root.
    """
    model, version = str(summary["model"]), int(summary["version"])
    at = f"--root {shlex.quote(_short_path(root))}"
    if summary["alias"] == CHAMPION:
        became = "became champion"
        step = (f"dpnet inpaint PHOTO MASK -o out.png {at}", "fill the white part of MASK")
    else:
        became = "became challenger, not champion"
        promote = f"dpnet registry promote {version} --model {model} --why TEXT {at}"
        step = (promote, "make it champion all the same")
    show = f"dpnet registry show {version} --model {model} {at}"
    return [
        printable(f"{model} version {version} {became}. {summary['reason']}"),
        "",
        *next_text([step, (show, "show what it was made from")]),
    ]


def _short_path(path: str) -> str:
    """Return the path relative to the working directory if it is below it."""
    if "://" in path:
        return path
    short = os.path.relpath(path)
    return path if short.startswith("..") else short
