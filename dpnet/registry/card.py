"""The model card of a registered version: its data, masks, figures, limits, terms and use.

`dpnet export` writes the same sections, and the figures in the form of Hugging Face's folder
`.eval_results`. All facts come from the root. What it does not record, the card says.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from data_prep.core.digest import SHORT
from data_prep.core.errors import PipelineError
from data_prep.core.manifest import read_manifest
from data_prep.core.record import parse_json
from data_prep.core.storage.store import Store
from data_prep.core.text import markdown_code, markdown_table, markdown_text
from dpnet.evaluation.protocol import METHODS, METRICS, SET_METRICS, set_figures, set_notes

Facts = dict[str, Any]

SHOWN = ("hole_psnr", "ssim", "lpips", "l1")  # metrics, where they were computed
LICENCES = {  # by the name of the photos or their layout
    "places2": "the photos of Places2 may be used for research and education only",
    "celeba": "the photos of CelebA may be used for non-commercial research only",
    "celeba-hq": "the photos of CelebA-HQ may be used for non-commercial research only",
    "paris-street-view": "the photos of Paris StreetView come from their authors on request",
    "bsds500": "the photos of BSDS500 may be used for non-commercial research and education only",
}
LIMITS = """\
## Limits

* The model invents the pixels in the hole. They do not show what was really there.
* Expect figures like those of the evaluation only for photos and masks that are similar to the
  training data.
"""


def card_facts(store: Store, record: Mapping[str, Any]) -> Facts:
    """Return what the root knows about a version. A part whose files are gone is absent."""
    facts: Facts = {key: record.get(key) for key in ("model", "version", "reason")}
    facts["evaluation"] = _evaluation(store, record)
    try:
        run = read_manifest(store, record["run"]["folder"])
    except PipelineError:
        return facts
    facts["run"] = {
        "name": run.name,
        "content_digest": run.content_digest,
        "settings_digest": run.request_digest,
        "steps": run.summary.get("steps"),
    }
    for role in ("images", "masks"):
        try:
            found = read_manifest(store, run.inputs[role].folder)
        except (PipelineError, KeyError):
            continue
        facts[role] = {
            "name": found.name,
            "content_digest": found.content_digest,
            "splits": found.summary.get("splits", {}),
            "settings": dict(found.settings),
        }
    return facts


def _evaluation(store: Store, record: Mapping[str, Any]) -> Facts:
    """Return the report of a version's evaluation, or only its digests."""
    found: Facts = {key: record.get(key) for key in ("hole_psnr", "pairs_digest")}
    try:
        folder = record["evaluation"]["folder"]
        manifest = read_manifest(store, folder)
        found |= {key: manifest.summary[key] for key in found}
        found["date"] = manifest.created
        report = parse_json(store.read(f"{folder}/report.json"))
        groups = {**report["figures"]["bins"], "all": report["figures"]["all"]}
        found["pairs"] = int(report["pairs"])
        found["groups"] = {
            name: {"pairs": int(group["pairs"]), "methods": dict(group["methods"])}
            for name, group in groups.items()
        }
        found["sets"], found["set_notes"] = set_figures(report), set_notes(report)
    except (OSError, PipelineError, ValueError, KeyError, TypeError, AttributeError):
        found.pop("groups", None)
    return found


def version_card(facts: Mapping[str, Any]) -> str:
    """Return the model card of a registered version in Markdown."""
    name, number = facts["model"], facts["version"]
    reference = f"models:/{name}/{number}"
    return "\n".join(
        [
            f"# {markdown_text(str(name))} version {number}\n",
            "This model fills the holes of photos (DPNet image inpainting). ROOT is the root that"
            " holds this file.\n",
            "## Use\n",
            f"    dpnet inpaint photo.png mask.png -o filled.png --root ROOT --model {reference}",
            f"    dpnet export {reference} -o exported --root ROOT\n",
            "```python",
            "import dpnet",
            "from PIL import Image",
            'photo, mask = Image.open("photo.png"), Image.open("mask.png")  # the hole is white',
            f'dpnet.inpaint(photo, mask, "{reference}", root="ROOT").save("filled.png")',
            "```\n",
            data_section(facts),
            evaluation_section(facts),
            LIMITS,
            licence_section(facts),
        ]
    )


def data_section(facts: Mapping[str, Any]) -> str:
    """Return the section about the photos, the masks and the training."""
    lines = ["## Data and training\n"]
    for role, label in (("images", "photos"), ("masks", "masks")):
        if found := facts.get(role):
            counts = ", ".join(
                f"{split} {figures['samples']}"
                for split, figures in found["splits"].items()
                if isinstance(figures, Mapping) and "samples" in figures
            )
            lines.append(
                f"* {label}: {markdown_code(found['name'])}, content digest"
                f" {found['content_digest'][:SHORT]}, samples: {counts or 'not recorded'}"
            )
        else:
            lines.append(f"* {label}: not recorded")
    if recipes := facts.get("masks", {}).get("settings", {}).get("recipes"):
        lines.append(f"* recipes of the masks: {markdown_text(', '.join(sorted(recipes)))}")
    if run := facts.get("run"):
        lines.append(
            f"* training: {markdown_code(run['name'])}, {run['steps']} steps, settings"
            f" {run['settings_digest'][:SHORT]}, content digest {run['content_digest'][:SHORT]}"
        )
    return "\n".join(lines) + "\n"


def evaluation_section(facts: Mapping[str, Any]) -> str:
    """Return the section about the evaluation: means with 95 % intervals by ratio bin."""
    evaluation = facts["evaluation"]
    lines = ["## Evaluation\n"]
    if isinstance(headline := evaluation.get("hole_psnr"), int | float):
        text = f"The hole PSNR, as a mean over the ratio bins, is {headline:.2f} dB."
        lines.append(f"{text}\n")
    groups = evaluation.get("groups")
    if not groups:
        lines.append("The report of the evaluation is not recorded.")
    else:
        metrics = _metrics(groups)
        rows = [
            [name, str(group["pairs"]), *(_cell(group, "dpnet", m) for m in metrics)]
            for name, group in groups.items()
        ]
        lines += markdown_table(["hole", "pairs", *(_label(m) for m in metrics)], rows)
        lines += ["", "Other methods, over all pairs:\n"]
        others = [
            [METHODS.get(name, name), *(_cell(groups["all"], name, m) for m in metrics)]
            for name in groups["all"]["methods"]
            if name != "dpnet"
        ]
        lines += markdown_table(["method", *(_label(m) for m in metrics)], others)
        lines += _sets_table(evaluation)
        lines.append(
            "\nIn brackets: 95 % intervals. Digest of the pairs of images and masks:"
            f" {evaluation['pairs_digest']}"
        )
    if facts.get("reason"):
        lines.append(f"\nWhen it was registered: {markdown_text(str(facts['reason']))}")
    return "\n".join(lines) + "\n"


def _sets_table(evaluation: Facts) -> list[str]:
    """Return a table of FID, P-IDS and U-IDS over all pairs, if they were computed."""
    if not evaluation.get("sets"):
        return []
    rows = [
        [METHODS.get(method, method), *(f"{own[m]:.{_digits(m)}f}" for m in SET_METRICS)]
        for method, own in evaluation["sets"].items()
    ]
    head = ["method", *(_label(m) for m in SET_METRICS)]
    notes = [f"\n{note}" for note in evaluation["set_notes"]]
    return ["", "All pairs together:\n", *markdown_table(head, rows), *notes]


def licence_section(facts: Mapping[str, Any]) -> str:
    """Return the section about the terms, as far as the name of the photos says them."""
    found = facts.get("images", {})
    names = (str(found.get("name", "")).lower(), found.get("settings", {}).get("layout"))
    known = next((LICENCES[name] for name in names if name in LICENCES), None)
    note = (
        f"By the name of the photos, {known}. Check the terms of their source."
        if known
        else "The terms of the photos are not recorded. Ask the people who trained the model."
    )
    return (
        "## Licence\n\nThe code is under Apache-2.0. The terms for the weights depend on the photos"
        f" they were trained on. {note}\n"
    )


def eval_results(facts: Mapping[str, Any]) -> str:
    """Return the figures as YAML for Hugging Face's folder `.eval_results`.

    `dataset.id` is the name of the photos: it becomes the id of a dataset on the Hub when the model
    is published there. Without a report of the evaluation the text is "".
    """
    import yaml

    evaluation = facts["evaluation"]
    groups = evaluation.get("groups")
    if not groups:
        return ""
    entries = []
    for metric in _metrics(groups):
        value = groups["all"]["methods"]["dpnet"][metric]
        entries.append(_entry(facts, metric, value["mean"], _interval_note(value, metric)))
    for metric, number in evaluation.get("sets", {}).get("dpnet", {}).items():
        notes = "".join(f" {note}" for note in evaluation["set_notes"])
        entries.append(_entry(facts, metric, number, f".{notes}" if notes else ""))
    return str(yaml.safe_dump(entries, sort_keys=False, allow_unicode=True, width=1000))


def _entry(facts: Mapping[str, Any], metric: str, value: float, note: str) -> Facts:
    """Return one figure as Hugging Face has it."""
    evaluation, images = facts["evaluation"], facts.get("images", {})
    kind = "over" if metric in SET_METRICS else "mean of"
    what = f"{_label(metric)}, {kind} {evaluation['pairs']} frozen pairs"
    return {
        "dataset": {
            "id": str(images.get("name", "not-recorded")),
            "task_id": f"inpainting-{metric.replace('_', '-')}",
            "revision": str(images.get("content_digest", "")),
        },
        "value": round(float(value), _digits(metric)),
        "date": evaluation["date"],
        "notes": f"{what} {str(evaluation['pairs_digest'])[:SHORT]}{note}",
    }


def _metrics(groups: Mapping[str, Any]) -> list[str]:
    """Return the metrics that DPNet has in every group."""
    return [
        metric
        for metric in SHOWN
        if all(_mean(group, "dpnet", metric) is not None for group in groups.values())
    ]


def _mean(group: Mapping[str, Any], method: str, metric: str) -> float | None:
    values = group["methods"].get(method)
    value = values.get(metric) if isinstance(values, Mapping) else None
    mean = value.get("mean") if isinstance(value, Mapping) else None
    return float(mean) if isinstance(mean, int | float) else None


def _cell(group: Mapping[str, Any], method: str, metric: str) -> str:
    """Return a mean and its interval, such as "26.47 [26.1, 26.9]"."""
    mean = _mean(group, method, metric)
    if mean is None:
        return "not computed"
    value, digits = group["methods"][method][metric], _digits(metric)
    if "low" not in value or "high" not in value:
        return f"{mean:.{digits}f}"
    return f"{mean:.{digits}f} [{value['low']:.{digits}f}, {value['high']:.{digits}f}]"


def _interval_note(value: Mapping[str, Any], metric: str) -> str:
    if "low" not in value or "high" not in value:
        return ""
    digits = _digits(metric)
    return f", 95 % interval {value['low']:.{digits}f} to {value['high']:.{digits}f}"


def _label(metric: str) -> str:
    known = METRICS | SET_METRICS
    return known[metric].label if metric in known else metric.upper()


def _digits(metric: str) -> int:
    known = METRICS | SET_METRICS
    return known[metric].digits if metric in known else 4
