// The tools: what a stroke of the mouse, a finger or the keyboard does to the hole.

import { HOLE } from "./mask.js";

const GROW = 1.15; // for each press of [ or ]

export class Painter {
  /** Paint with a brush on what the view shows. `changed` is called after each step. */
  constructor(view, changed) {
    Object.assign(this, { view, changed });
    this.mask = null; // null: nothing can be painted now
    this.tool = "brush";
    this.size = 40;
    this.most = 4000;
    this.last = null; // the pixel where the stroke is
    this.value = HOLE;
  }

  /** Set the brush's diameter in pixels of the photo, within its bounds. */
  setSize(size) {
    this.size = Math.min(this.most, Math.max(1, Math.round(size) || 1));
  }

  /** Make the brush one step larger or smaller. */
  grow(direction) {
    const size = this.size * GROW ** direction;
    this.setSize(direction > 0 ? Math.max(this.size + 1, size) : Math.min(this.size - 1, size));
  }

  canPaint() {
    return Boolean(this.mask) && this.tool !== "move";
  }

  start(pixel, erase) {
    if (!this.canPaint()) return;
    this.last = this.first = pixel;
    this.value = erase || this.tool === "eraser" ? 0 : HOLE;
    this.mask.begin();
    if (this.tool !== "box") this.#line(pixel);
  }

  move(pixel) {
    if (!this.last) return;
    if (this.tool !== "box" && (pixel.x !== this.last.x || pixel.y !== this.last.y)) {
      this.#line(pixel);
    }
    this.last = pixel;
  }

  finish() {
    if (!this.last) return;
    if (this.tool === "box") this.view.redrawHole(this.mask.box(this.first, this.last, this.value));
    this.mask.end();
    this.last = null;
    this.changed();
  }

  /** Take the current stroke back. */
  cancel() {
    if (!this.last) return;
    this.view.redrawHole(this.mask.cancel());
    this.last = null;
    this.changed();
  }

  /** Show the brush at a pixel, or nothing; with a cross if the keyboard moves it. */
  hover(pixel, cross = false) {
    this.hovered = pixel;
    if (!pixel || !this.canPaint()) return this.view.mark(null);
    const marker = cross ? { cross: pixel } : {};
    if (this.tool !== "box") Object.assign(marker, { circle: pixel, diameter: this.size });
    else if (this.last) Object.assign(marker, { from: this.first, to: pixel });
    this.view.mark(marker);
  }

  /** Return the nearest pixel of the photo. */
  clamp(pixel) {
    const { width, height } = this.mask;
    return {
      x: Math.min(width - 1, Math.max(0, pixel.x)),
      y: Math.min(height - 1, Math.max(0, pixel.y)),
    };
  }

  #line(pixel) {
    this.view.redrawHole(this.mask.line(this.last, pixel, this.size, this.value));
  }
}
