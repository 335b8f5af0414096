"""The report's script: sort the pairs, and move the slider of each pair."""

import base64
import hashlib

# It only moves elements and sets a CSS variable. Without it the page shows everything, unsorted.
SCRIPT = """
"use strict";
const list = document.querySelector(".pairs");
const metric = document.querySelector("#sort-metric");
const order = document.querySelector("#sort-order");
const number = (card) => {
  const value = card.dataset[metric.value];
  return value === undefined || value === "" ? null : Number(value);
};
const sort = () => {
  const sign = order.value === "low" ? 1 : -1;
  const cards = [...list.children].sort((a, b) => {
    const [x, y] = [number(a), number(b)];
    if (x === null || y === null) return (x === null) - (y === null);
    return sign * (x - y);
  });
  list.append(...cards);
};
if (list) {
  metric.addEventListener("change", sort);
  order.addEventListener("change", sort);
  document.querySelector(".sort").hidden = false;
  for (const slider of document.querySelectorAll(".slider input")) {
    const move = () => slider.parentElement.style.setProperty("--at", slider.value + "%");
    slider.addEventListener("input", move);
    slider.hidden = false;
    move();
  }
}
"""
_HASH = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
# The page shows its own images and styles, runs only this script, and loads nothing.
POLICY = (
    f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{_HASH}'"
)
