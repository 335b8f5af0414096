"""Speed of the mask recipes: masks drawn, measured and encoded in a second by one core.

    python benchmarks/masks.py [--size 256] [--masks 300] [--repeats 5] [--json]

The goal is 500 masks a second at 256 x 256. Times are processor times of one thread, so other work
on the machine has little effect. Each repeat measures all recipes in turn. The value is the median
of the repeats, and the spread is the slowest and the fastest.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import cv2

from data_prep.masks.codec import encode_png
from data_prep.masks.plan import touches_border
from data_prep.masks.recipes import RECIPES, draw, hole_ratio

GOAL = 500.0  # masks/s


def seconds(recipe: str, size: int, masks: int) -> float:
    """Return the processor time to draw, measure and encode `masks` masks of a recipe."""
    start = time.process_time()
    for index in range(masks):
        mask = draw(recipe, 0, index, size)
        hole_ratio(mask)
        touches_border(mask)
        encode_png(mask)
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--size", type=int, default=256, help="side of a mask in pixels")
    parser.add_argument("--masks", type=int, default=300, help="masks of a recipe in a repeat")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    options = parser.parse_args()
    cv2.setNumThreads(1)
    speeds: dict[str, list[float]] = {recipe: [] for recipe in RECIPES}
    for recipe in RECIPES:
        seconds(recipe, options.size, 20)  # imports and caches
    for _ in range(options.repeats):
        for recipe, found in speeds.items():
            found.append(options.masks / seconds(recipe, options.size, options.masks))
    print(f"{'recipe':<16}{'masks/s':>10}{'spread':>18}")
    rows = []
    for recipe, found in speeds.items():
        low, median, high = min(found), statistics.median(found), max(found)
        print(f"{recipe:<16}{median:>10.0f}{f'{low:.0f} - {high:.0f}':>18}")
        spread = [round(low, 1), round(high, 1)]
        value = round(median, 1)
        rows.append({"name": recipe, "value": value, "unit": "masks/s", "spread": spread})
    slowest = min(statistics.median(found) for found in speeds.values())
    print(f"slowest: {slowest:.0f} masks/s at {options.size}, {slowest / GOAL:.1f} x the goal")
    if options.json:
        print(json.dumps({"rows": rows, "ratios": {"of_mask_goal": round(slowest / GOAL, 3)}}))


if __name__ == "__main__":
    main()
