// What the canvases show: the photo or two results under one zoom, the hole over it, the brush.
// Positions named x and y are pixels of the photo; `at` positions are pixels of the page.

import { HOLE } from "./mask.js";

const MOST_ZOOM = 40;
const MARGIN = 24;
const MOST_RATIO = 2; // more screen pixels than this for a page pixel only cost time
const TAPS = 4; // looks at the mask for a screen pixel, in each direction
const HOLE_COLOUR = [255, 45, 100, 150]; // red, green, blue, opacity

export class View {
  /** Show nothing yet. `canvases` are {photo, hole, brush}; `stage` is the element around them. */
  constructor(stage, canvases) {
    this.stage = stage;
    this.contexts = {
      photo: canvases.photo.getContext("2d"),
      hole: canvases.hole.getContext("2d"),
      brush: canvases.brush.getContext("2d"),
    };
    this.panes = []; // {photo, part}: part is a rectangle of the stage, from 0 to 1
    this.together = false; // the panes lie over each other and show parts of one picture
    this.mask = null;
    this.marker = null;
    this.scale = 1; // page pixels for each pixel of the photo
    this.offset = { x: 0, y: 0 };
    this.onChange = () => {};
    this.waiting = false;
    this.dirty = null;
    new ResizeObserver(() => this.#resize()).observe(stage);
  }

  get width() {
    return this.stage.clientWidth;
  }

  get height() {
    return this.stage.clientHeight;
  }

  /** Show the photo with its hole. */
  showPhoto(photo, mask) {
    this.panes = [{ photo, part: [0, 0, 1, 1] }];
    this.together = false;
    this.mask = mask;
    this.redraw();
  }

  /** Show the photo before and after, divided at a share of the width. */
  showSlider(before, after, share) {
    this.panes = [
      { photo: before, part: [0, 0, share, 1] },
      { photo: after, part: [share, 0, 1, 1] },
    ];
    this.together = true;
    this.mask = null;
    this.redraw();
  }

  /** Show two results next to each other; in a tall stage, one above the other. */
  showPair(one, other) {
    const tall = this.height > this.width;
    this.panes = [
      { photo: one, part: tall ? [0, 0, 1, 0.5] : [0, 0, 0.5, 1] },
      { photo: other, part: tall ? [0, 0.5, 1, 1] : [0.5, 0, 1, 1] },
    ];
    this.together = false;
    this.mask = null;
    this.redraw();
  }

  /** Show the whole photo. */
  fit() {
    const size = this.#paneSize();
    const photo = this.panes[0]?.photo;
    if (!photo || !size.width) return;
    const margin = Math.min(MARGIN, size.width / 20);
    this.scale = Math.min(
      (size.width - 2 * margin) / photo.width,
      (size.height - 2 * margin) / photo.height,
      8,
    );
    this.fitScale = this.scale;
    this.offset.x = (size.width - photo.width * this.scale) / 2;
    this.offset.y = (size.height - photo.height * this.scale) / 2;
    this.redraw();
  }

  /** Zoom by a factor, so that the place at a page position stays. */
  zoom(factor, at = this.#centre()) {
    const place = this.#inPane(at);
    const least = Math.min(this.fitScale ?? 1, 1) / 2;
    const scale = Math.min(MOST_ZOOM, Math.max(least, this.scale * factor));
    for (const axis of ["x", "y"]) {
      this.offset[axis] = place[axis] - ((place[axis] - this.offset[axis]) * scale) / this.scale;
    }
    this.scale = scale;
    this.pan(0, 0);
  }

  /** Move the photo by page pixels, but not out of sight. */
  pan(right, down) {
    const photo = this.panes[0]?.photo;
    if (!photo) return;
    const size = this.#paneSize();
    const keep = (value, length, room) => Math.min(room * 0.75, Math.max(room / 4 - length, value));
    this.offset.x = keep(this.offset.x + right, photo.width * this.scale, size.width);
    this.offset.y = keep(this.offset.y + down, photo.height * this.scale, size.height);
    this.redraw();
  }

  /** Return the pixel of the photo at a page position; it may be outside of the photo. */
  pixelAt(at) {
    const place = this.#inPane(at);
    return {
      x: Math.floor((place.x - this.offset.x) / this.scale),
      y: Math.floor((place.y - this.offset.y) / this.scale),
    };
  }

  /** Return the page position of the middle of a pixel in the first pane. */
  positionOf(pixel) {
    return {
      x: this.offset.x + (pixel.x + 0.5) * this.scale,
      y: this.offset.y + (pixel.y + 0.5) * this.scale,
    };
  }

  /** Move the photo so that a pixel is in sight. */
  reveal(pixel) {
    const at = this.positionOf(pixel);
    const push = (value, room) => Math.max(MARGIN - value, 0) - Math.max(value - room + MARGIN, 0);
    const [right, down] = [push(at.x, this.width), push(at.y, this.height)];
    if (right || down) this.pan(right, down);
  }

  /** Draw everything again in the next frame. */
  redraw() {
    this.dirty = "all";
    this.#ask();
  }

  /** Draw a changed rectangle of the mask in the next frame. */
  redrawHole(area) {
    if (!area?.width || this.dirty === "all") return;
    this.dirty = this.dirty ? around(this.dirty, area) : area;
    this.#ask();
  }

  /** Show the brush or a box: {circle, diameter}, {from, to}, with `cross` for the keyboard. */
  mark(marker) {
    this.marker = marker;
    this.#ask();
  }

  #ask() {
    if (this.waiting) return;
    this.waiting = true;
    requestAnimationFrame(() => {
      this.waiting = false;
      this.#draw();
    });
  }

  #resize() {
    this.ratio = Math.min(MOST_RATIO, window.devicePixelRatio || 1);
    for (const { canvas } of Object.values(this.contexts)) {
      canvas.width = Math.round(this.width * this.ratio);
      canvas.height = Math.round(this.height * this.ratio);
    }
    this.onResize?.();
    this.redraw();
  }

  #paneSize() {
    const [left, top, right, bottom] = this.together ? [0, 0, 1, 1] : (this.panes[0]?.part ?? []);
    return { width: (right - left) * this.width, height: (bottom - top) * this.height };
  }

  #centre() {
    const size = this.#paneSize();
    return { x: size.width / 2, y: size.height / 2 };
  }

  /** Return a page position relative to the pane that it is in. */
  #inPane(at) {
    const size = this.#paneSize();
    if (this.together || this.panes.length < 2) return at;
    return { x: at.x % size.width, y: at.y % size.height };
  }

  #draw() {
    const dirty = this.dirty;
    this.dirty = null;
    if (dirty === "all") {
      this.#drawPanes();
      this.#drawHole(null);
      this.onChange();
    } else if (dirty) {
      this.#drawHole(dirty);
    }
    this.#drawBrush();
  }

  #drawPanes() {
    const context = this.contexts.photo;
    context.setTransform(1, 0, 0, 1, 0, 0);
    context.clearRect(0, 0, context.canvas.width, context.canvas.height);
    for (const pane of this.panes) this.#drawPane(context, pane);
  }

  #drawPane(context, { photo, part }) {
    const [left, top] = [part[0] * this.width, part[1] * this.height];
    const [width, height] = [(part[2] - part[0]) * this.width, (part[3] - part[1]) * this.height];
    context.save();
    context.setTransform(this.ratio, 0, 0, this.ratio, 0, 0);
    context.beginPath();
    context.rect(left, top, width, height);
    context.clip();
    if (!this.together) context.translate(left, top);
    const level = photo.level(this.scale * this.ratio);
    context.imageSmoothingEnabled = this.scale * this.ratio < 3;
    context.imageSmoothingQuality = "medium";
    const [wide, high] = [photo.width * this.scale, photo.height * this.scale];
    context.drawImage(level, this.offset.x, this.offset.y, wide, high);
    context.restore();
  }

  /** Draw the hole, in a rectangle of the photo or everywhere. */
  #drawHole(area) {
    const context = this.contexts.hole;
    const { canvas } = context;
    const whole = { left: 0, top: 0, right: canvas.width, bottom: canvas.height };
    const part = area ? this.#onScreen(area, canvas) : whole;
    const [width, height] = [part.right - part.left, part.bottom - part.top];
    if (width <= 0 || height <= 0) return;
    if (!this.mask?.total) {
      context.clearRect(part.left, part.top, width, height);
      return;
    }
    const image = context.createImageData(width, height);
    const origin = {
      x: this.offset.x * this.ratio - part.left,
      y: this.offset.y * this.ratio - part.top,
    };
    paintHole(image, this.mask, this.scale * this.ratio, origin);
    context.putImageData(image, part.left, part.top);
  }

  /** Return the screen pixels that a rectangle of the photo touches. */
  #onScreen(area, canvas) {
    const scale = this.scale * this.ratio;
    const [x, y] = [this.offset.x * this.ratio, this.offset.y * this.ratio];
    return {
      left: Math.max(0, Math.floor(area.x * scale + x) - 1),
      top: Math.max(0, Math.floor(area.y * scale + y) - 1),
      right: Math.min(canvas.width, Math.ceil((area.x + area.width) * scale + x) + 1),
      bottom: Math.min(canvas.height, Math.ceil((area.y + area.height) * scale + y) + 1),
    };
  }

  #drawBrush() {
    const context = this.contexts.brush;
    context.setTransform(1, 0, 0, 1, 0, 0);
    context.clearRect(0, 0, context.canvas.width, context.canvas.height);
    if (!this.marker) return;
    context.setTransform(this.ratio, 0, 0, this.ratio, 0, 0);
    const path = new Path2D();
    const { circle, diameter, from, to, cross } = this.marker;
    if (from) this.#addBox(path, from, to);
    if (circle) {
      const at = this.positionOf(circle);
      path.arc(at.x, at.y, Math.max(2, (diameter / 2) * this.scale), 0, 2 * Math.PI);
    }
    if (cross) addCross(path, this.positionOf(cross));
    // Dark under light, so that the line is seen over every photo.
    for (const [colour, width] of [["rgb(0 0 0 / 0.65)", 3.5], ["white", 1.5]]) {
      context.strokeStyle = colour;
      context.lineWidth = width;
      context.stroke(path);
    }
  }

  #addBox(path, from, to) {
    const left = this.offset.x + Math.min(from.x, to.x) * this.scale;
    const top = this.offset.y + Math.min(from.y, to.y) * this.scale;
    const width = (Math.abs(from.x - to.x) + 1) * this.scale;
    path.rect(left, top, width, (Math.abs(from.y - to.y) + 1) * this.scale);
  }
}

function addCross(path, at) {
  for (const [x, y] of [[1, 0], [0, 1]]) {
    for (const side of [-1, 1]) {
      path.moveTo(at.x + 4 * side * x, at.y + 4 * side * y);
      path.lineTo(at.x + 16 * side * x, at.y + 16 * side * y);
    }
  }
}

function around(one, other) {
  const [x, y] = [Math.min(one.x, other.x), Math.min(one.y, other.y)];
  const right = Math.max(one.x + one.width, other.x + other.width);
  const bottom = Math.max(one.y + one.height, other.y + other.height);
  return { x, y, width: right - x, height: bottom - y };
}

/**
 * Colour the screen pixels that show a part of the hole.
 *
 * @param image ImageData to write.
 * @param scale screen pixels for each pixel of the mask.
 * @param origin where the mask's left upper corner is in the image.
 */
function paintHole(image, mask, scale, origin) {
  const target = new Uint32Array(image.data.buffer);
  const colour = new Uint32Array(new Uint8ClampedArray(HOLE_COLOUR).buffer)[0];
  const taps = Math.max(1, Math.min(TAPS, Math.ceil(1 / scale)));
  const xs = places(image.width, scale, origin.x, mask.width, taps);
  const ys = places(image.height, scale, origin.y, mask.height, taps);
  for (let row = 0; row < image.height; row++) {
    for (let column = 0; column < image.width; column++) {
      if (isEmpty(mask, xs, column * taps, ys, row * taps, taps)) continue;
      if (touches(mask, xs, column * taps, ys, row * taps, taps)) {
        target[row * image.width + column] = colour;
      }
    }
  }
}

/** Return for each screen pixel the `taps` mask positions to look at; -1 is outside. */
function places(count, scale, origin, limit, taps) {
  const found = new Int32Array(count * taps);
  for (let place = 0; place < found.length; place++) {
    const position = Math.floor((place / taps + 0.5 / taps - origin) / scale);
    found[place] = position >= 0 && position < limit ? position : -1;
  }
  return found;
}

/** Return whether the mask has no hole around a screen pixel, which saves most looks at it. */
function isEmpty(mask, xs, column, ys, row, taps) {
  const [left, right] = [xs[column], xs[column + taps - 1]];
  const [top, bottom] = [ys[row], ys[row + taps - 1]];
  if (Math.max(left, right) < 0 || Math.max(top, bottom) < 0) return true;
  if (Math.min(left, right, top, bottom) < 0) return false;
  return mask.emptyAt(left, top) && (taps === 1 || mask.emptyAt(right, bottom));
}

function touches(mask, xs, column, ys, row, taps) {
  for (let down = row; down < row + taps; down++) {
    if (ys[down] < 0) continue;
    const first = ys[down] * mask.width;
    for (let right = column; right < column + taps; right++) {
      if (xs[right] >= 0 && mask.pixels[first + xs[right]] === HOLE) return true;
    }
  }
  return false;
}
