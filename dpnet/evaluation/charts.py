"""The report's charts, as inline SVG in the text colour of the page."""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from data_prep.core.text import html_text
from dpnet.evaluation.protocol import METHODS, OURS

INK = "#123457"  # replaced with the text colour of the page in the finished SVG
COLOURS = {  # of the methods that are always measured; other models take from _OTHERS
    "dpnet": "#2f7de1", "smooth_fill": "#2a9d6f", "telea": "#d9730d",
    "navier_stokes": "#b455c8", "mean_fill": "#8a8f98"}  # fmt: skip
_PEERS = ("#c9a100", "#d64550", "#7a5cd6", "#12a4b8")
_OTHERS = ("#2f7de1", "#d9730d", "#2e9e6b", "#b455c8", "#c9a100", "#d64550", "#8a8f98")

Points = Sequence[tuple[float, float]]


def validation_chart(curves: Mapping[str, Points]) -> str:
    """Draw hole PSNR in dB over training steps, by method. Simple methods are dashed lines."""
    figure, axes = _figure("training step", "hole PSNR, dB")
    for method, points in curves.items():
        ours = method == OURS
        axes.plot(
            *_columns(points),
            color=COLOURS[method],
            ls="-" if ours else "--",
            marker="o" if ours and len(points) <= 60 else "",
            ms=3.5,
            lw=1.8 if ours else 1.4,
            zorder=3 if ours else 2,
            label=METHODS[method],
        )
    _legend(axes)
    return _svg(figure, "validation hole PSNR over training")


def losses_chart(losses: Mapping[str, Points]) -> str:
    """Draw training losses by name over steps, on a logarithmic scale if all are positive."""
    figure, axes = _figure("training step", "loss")
    for number, (name, points) in enumerate(sorted(losses.items())):
        axes.plot(*_columns(points), color=_OTHERS[number % len(_OTHERS)], lw=1.4, label=name)
    if all(value > 0 for points in losses.values() for _, value in points):
        axes.set_yscale("log")
    _legend(axes)
    return _svg(figure, "training losses")


def bins_chart(
    groups: Sequence[str],
    values: Mapping[str, Sequence[tuple[float, float, float]]],
    title: str,
    labels: Mapping[str, str] = METHODS,
) -> str:
    """Draw the mean of each method in each group, with its interval as a bar.

    Args:
        groups: names of the groups.
        values: by method, a triple (mean, low, high) for each group.
        title: label of the vertical axis.
        labels: names of the methods.
    """
    colours = colours_of(labels)
    figure, axes = _figure("hole, share of the image", title)
    for number, (method, triples) in enumerate(values.items()):
        x = [
            at + 0.8 / max(5, len(values)) * (number - (len(values) - 1) / 2)
            for at in range(len(groups))
        ]
        means = [mean for mean, _, _ in triples]
        below = [mean - low for mean, low, _ in triples]
        above = [high - mean for mean, _, high in triples]
        axes.errorbar(
            x,
            means,
            [below, above],
            color=colours[method],
            fmt="o",
            ms=5,
            lw=1.6,
            label=labels[method],
        )
    axes.set_xticks(range(len(groups)), groups)
    _legend(axes)
    return _svg(figure, title)


def colours_of(methods: Iterable[str]) -> dict[str, str]:
    """Return a colour for each method."""
    others = itertools.cycle(_PEERS)
    return {method: COLOURS.get(method) or next(others) for method in methods}


def _columns(points: Points) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _figure(x_label: str, y_label: str) -> tuple[Any, Any]:
    # Not pyplot, which has global state and chooses a window system.
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2, 3.0), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.add_subplot()
    axes.set_facecolor("none")
    axes.grid(axis="y", color=INK, alpha=0.15, lw=0.8)
    axes.tick_params(which="both", colors=INK, length=0, labelsize=9)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(INK)
    axes.set_xlabel(x_label, color=INK, fontsize=9)
    axes.set_ylabel(y_label, color=INK, fontsize=9)
    return figure, axes


def _legend(axes: Any) -> None:
    axes.legend(
        frameon=False, labelcolor=INK, fontsize=9, ncols=3, loc="lower left", bbox_to_anchor=(0, 1)
    )


def _svg(figure: Any, label: str) -> str:
    import matplotlib

    file = io.StringIO()
    # Keep text as text, and give the same chart the same ids.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": label}):
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    svg = re.sub(r"<metadata>.*?</metadata>", "", file.getvalue(), flags=re.DOTALL)
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    return svg.replace("<svg", f'<svg role="img" aria-label="{html_text(label)}"', 1)
