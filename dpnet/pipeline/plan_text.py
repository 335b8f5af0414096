"""Show a plan: as text for a terminal, and as Markdown for the page of a run."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence

from data_prep.core.text import (
    aligned_table,
    count_of,
    duration,
    markdown_table,
    markdown_text,
    printable,
)
from data_prep.shards.split_size import SplitSize
from dpnet.pipeline.cost import cost_text
from dpnet.pipeline.finished import STAGES
from dpnet.pipeline.plan import TABLE_GPUS, Plan

WIDTH = 100  # columns of the text
_MARKS = {"CPU decode": "c", "storage": "s"}  # of limits in the table


def plan_text(plan: Plan) -> str:
    """Return a plan as text of at most 100 columns."""
    if len(plan.finished) == STAGES:
        return printable(
            f"{plan.name}: nothing is left to do, because all stages are finished. A larger"
            " train.steps trains longer."
        )
    lines = [printable(f"{plan.name}: the plan. Nothing is started."), ""]
    for title, sentence in _facts(plan):
        wrapped = _wrap(printable(sentence), WIDTH - 15)
        lines += [f"{title if not number else '':15}{line}" for number, line in enumerate(wrapped)]
    if plan.table:
        lines += ["", *_wrap(_table_caption(plan), WIDTH), ""]
        lines += aligned_table([_heading(plan), *_rows(plan)], ">" * len(_heading(plan)))
    lines += ["", "Assumptions:"]
    for each in plan.assumptions:
        first, *others = _wrap(printable(each), WIDTH - 2)
        lines += [f"* {first}", *(f"  {line}" for line in others)]
    return "\n".join(lines)


def _wrap(text: str, width: int) -> list[str]:
    """Return the lines of a text. A path or an option stays whole, even if it is too long."""
    return textwrap.wrap(text, width, break_on_hyphens=False, break_long_words=False)


def plan_markdown(plan: Plan) -> list[str]:
    """Return a plan as lines of Markdown."""
    lines = markdown_table(
        ["", "plan"],
        [[markdown_text(title), markdown_text(sentence)] for title, sentence in _facts(plan)],
    )
    if plan.table:
        lines += ["", markdown_text(_table_caption(plan)), ""]
        lines += markdown_table(_heading(plan), _rows(plan))
    lines += ["", *(f"* {markdown_text(each)}" for each in plan.assumptions)]
    return lines


def _facts(plan: Plan) -> list[tuple[str, str]]:
    """Return the title and the sentence of each fact."""
    images, masks = plan.images, plan.masks
    facts = [
        ("images", f"{_size(images.splits)}; {images.source}"),
        ("masks", f"{_size(masks.splits)}; {masks.source}"),
    ]
    if images.photos:
        read = f", {_bytes(images.photo_bytes)} to read" if images.photo_bytes else ""
        hours = _hours(plan.prepare_core_hours)
        facts.append(("prepare", f"{images.photos:,} photos{read}: {hours} of one core"))
    facts += _training(plan)
    facts.append(("S3 requests", _requests(plan)))
    if plan.storage_money:
        facts.append(("storage", f"{plan.storage_money:.2f} {plan.currency} a month"))
    return facts


def _training(plan: Plan) -> list[tuple[str, str]]:
    """Return the facts about the training."""
    if not plan.steps:
        return [("train", "no step is left")]
    facts = [
        (
            "train",
            f"{plan.steps:,} steps of {plan.batch} samples: each image {plan.epochs:.3g} times",
        )
    ]
    if plan.rates is not None and plan.hours is not None and plan.cost is not None:
        kind = "GPU" if plan.machines.gpus else "worker"
        facts.append(
            (
                "time and cost",
                f"{_hours(plan.hours)} on {count_of(plan.machines.workers, kind)}:"
                f" {cost_text(plan.cost)}",
            )
        )
        rates = ", ".join(f"{name} {rate:,.0f}" for name, rate in plan.rates.limits.items())
        facts.append(
            ("bottleneck", f"{plan.rates.bottleneck} (images/s that each part can give: {rates})")
        )
    if plan.machines.gpus and plan.speed is not None:
        facts.append(("cores", f"each GPU needs {plan.cores_per_worker:.2f} cores to decode"))
    if (lost := plan.interruption) is not None:
        facts.append(
            (
                "interruption",
                f"the loss of a machine repeats {lost.steps:g} steps on average and"
                f" {lost.most_steps:,} at most (none if the machine is warned), and takes"
                f" {duration(lost.seconds)} with the restart: {cost_text(lost.cost)}",
            )
        )
    return facts


def _size(splits: Mapping[str, SplitSize]) -> str:
    """Return the size of a dataset: "900 train, 50 val, 50 test in 3 shards, 30.1 MB"."""
    counts = ", ".join(f"{size.samples:,} {split}" for split, size in splits.items())
    shards = sum(size.shards for size in splits.values())
    size = sum(each.bytes for each in splits.values())
    return f"{counts} in {count_of(shards, 'shard')}, {_bytes(size)}"


def _requests(plan: Plan) -> str:
    parts = [
        f"{stage} {each.reads:,} reads, {each.writes:,} writes"
        for stage, each in plan.requests.items()
    ]
    text = "if the root is on S3: " + "; ".join(parts)
    return f"{text}: {plan.request_money:.2f} {plan.currency}" if plan.request_money else text


def _table_caption(plan: Plan) -> str:
    kind = "GPUs" if plan.machines.gpus else "workers"
    limits = {limit for row in plan.table for limit in row.bottlenecks.values()}
    marks = [f"{mark}: limited by {limit}" for limit, mark in _MARKS.items() if limit in limits]
    return (
        f"Training by number of images and {kind}, in {'; '.join(['hours', *marks])}. Each image is"
        " trained on as often as above, and each worker has the same samples a step."
    )


def _heading(plan: Plan) -> list[str]:
    return ["images", "shards", "size", "prepare, core-h", *(f"{gpus}" for gpus in TABLE_GPUS)]


def _rows(plan: Plan) -> Sequence[list[str]]:
    return [
        [
            f"10^{len(str(row.images)) - 1}",
            f"{row.shards:,}",
            _bytes(row.bytes),
            f"{row.prepare_core_hours:,.1f}",
            *(
                f"{_number(row.hours[gpus])} {_MARKS.get(row.bottlenecks[gpus], '')}".rstrip()
                for gpus in TABLE_GPUS
            ),
        ]
        for row in plan.table
    ]


def _number(hours: float) -> str:
    return f"{hours:,.0f}" if hours >= 10 else f"{hours:.2g}"


def _hours(hours: float) -> str:
    return f"{hours:,.1f} h" if hours >= 1 else duration(hours * 3600)


def _bytes(number: float) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number / 1e3:.0f} KB"
