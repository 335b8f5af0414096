// Mouse, pen, fingers and keys on the stage, as the same few actions:
// start, move and finish a stroke at a pixel of the photo; pan and zoom.

const PAN_STEP = 60; // page pixels for an arrow key
const CURSOR_STEP = 12;
const SHORT_STROKE = 20; // page pixels; a shorter one was the first finger of two
const WHEEL = 0.0016; // zoom for each page pixel that a wheel scrolls
const PINCH = 0.012; // a touchpad sends a pinch as small steps of a wheel with Ctrl

export class Input {
  /**
   * Listen to a stage.
   *
   * @param actions {canPaint, start(pixel, erase), move(pixel), finish, cancel, hover(pixel, cross),
   *   clamp(pixel)}.
   */
  constructor(stage, view, actions) {
    Object.assign(this, { stage, view, actions });
    this.pointers = new Map();
    this.mode = null; // "paint", "pan" or "pinch"
    this.space = false;
    this.cursor = null; // the pixel of the keyboard's cursor
    this.pen = null; // the key that put the keyboard's pen down
    this.#listen();
  }

  /** Show or hide the keyboard's cursor. */
  setCursor(on) {
    this.#liftPen();
    const centre = { x: this.view.width / 2, y: this.view.height / 2 };
    const shown = on && this.actions.canPaint();
    this.cursor = shown ? this.actions.clamp(this.view.pixelAt(centre)) : null;
    this.actions.hover(this.cursor, true);
  }

  #listen() {
    const on = (name, action) => this.stage.addEventListener(name, action, { passive: false });
    on("pointerdown", (event) => this.#down(event));
    on("pointermove", (event) => this.#moved(event));
    on("pointerup", (event) => this.#up(event));
    on("pointercancel", (event) => this.#up(event));
    on("pointerleave", () => this.mode || this.cursor || this.actions.hover(null));
    on("contextmenu", (event) => event.preventDefault());
    on("wheel", (event) => this.#wheel(event));
    on("keydown", (event) => this.#key(event));
    on("focus", () => {
      if (this.stage.matches(":focus-visible") && !this.pointers.size) this.setCursor(true);
    });
    on("blur", () => this.setCursor(false));
    window.addEventListener("keydown", (event) => this.#space(event, true));
    window.addEventListener("keyup", (event) => this.#space(event, false));
  }

  #at(event) {
    const box = this.stage.getBoundingClientRect();
    return { x: event.clientX - box.left, y: event.clientY - box.top };
  }

  #down(event) {
    if (event.target.closest("button, input, a, label")) return;
    if (this.cursor) this.setCursor(false);
    this.stage.setPointerCapture(event.pointerId);
    this.pointers.set(event.pointerId, this.#at(event));
    if (this.pointers.size === 2) return this.#startPinch();
    if (this.pointers.size > 2) return;
    const middle = event.button === 1;
    if (middle || this.space || !this.actions.canPaint()) return this.#setMode("pan");
    this.began = this.#at(event);
    this.reached = 0; // the largest distance from there
    this.#setMode("paint");
    const erase = event.button === 2 || event.button === 5 || event.altKey; // 5: a pen's eraser
    this.actions.start(this.view.pixelAt(this.#at(event)), erase);
  }

  #setMode(mode) {
    this.mode = mode;
    this.stage.dataset.mode = mode ?? "";
  }

  #startPinch() {
    if (this.mode === "paint") {
      if (this.reached < SHORT_STROKE) this.actions.cancel();
      else this.actions.finish();
    }
    this.#setMode("pinch");
    this.fingers = fingersOf(this.pointers);
  }

  #moved(event) {
    const at = this.#at(event);
    const before = this.pointers.get(event.pointerId);
    if (!before) return this.cursor || this.actions.hover(this.view.pixelAt(at));
    this.pointers.set(event.pointerId, at);
    if (this.mode === "paint") this.#paint(event);
    else if (this.mode === "pan") this.view.pan(at.x - before.x, at.y - before.y);
    else if (this.mode === "pinch" && this.pointers.size >= 2) this.#pinch();
  }

  #paint(event) {
    const passed = event.getCoalescedEvents?.() ?? []; // what the mouse did since the last frame
    for (const one of passed.length ? passed : [event]) {
      this.actions.move(this.view.pixelAt(this.#at(one)));
    }
    const at = this.#at(event);
    this.reached = Math.max(this.reached, Math.hypot(at.x - this.began.x, at.y - this.began.y));
    this.actions.hover(this.view.pixelAt(at));
  }

  #pinch() {
    const [was, now] = [this.fingers, fingersOf(this.pointers)];
    this.view.pan(now.x - was.x, now.y - was.y);
    this.view.zoom(now.distance / was.distance, now);
    this.fingers = now;
  }

  #up(event) {
    if (!this.pointers.delete(event.pointerId)) return;
    if (this.mode === "paint") {
      if (event.type === "pointercancel") this.actions.cancel();
      else this.actions.finish();
    }
    if (this.mode === "pinch" && this.pointers.size >= 2) this.fingers = fingersOf(this.pointers);
    else if (!this.pointers.size || this.mode !== "pinch") this.#setMode(null);
    if (event.pointerType === "touch") this.actions.hover(null);
  }

  #wheel(event) {
    event.preventDefault();
    const lines = event.deltaMode === 1 ? 32 : 1;
    const [right, down] = [event.deltaX * lines, event.deltaY * lines];
    if (event.shiftKey) this.view.pan(-(right || down), right ? -down : 0);
    else this.view.zoom(Math.exp(-down * (event.ctrlKey ? PINCH : WHEEL)), this.#at(event));
  }

  #space(event, down) {
    if (event.key !== " ") return;
    if (!down && this.pen === " ") this.#liftPen();
    const here = event.target === document.body || event.target === this.stage;
    this.space = down && here;
    this.stage.classList.toggle("grab", this.space && !this.cursor);
    if (down && here) event.preventDefault(); // the page would scroll
  }

  #key(event) {
    if (event.target !== this.stage || event.altKey || event.metaKey) return;
    const arrow = ARROWS[event.key];
    if (arrow) this.#arrow(arrow, event);
    else if (event.key === " " && this.cursor) this.#dropPen(" ");
    else if (event.key === "Enter" && !event.ctrlKey) this.#enter();
    else if (event.key === "Escape" && (this.pen || this.cursor)) this.#escape();
    else return;
    event.preventDefault();
  }

  #arrow([x, y], event) {
    if (!this.cursor || event.ctrlKey) return this.view.pan(-x * PAN_STEP, -y * PAN_STEP);
    const step = event.shiftKey ? 1 : Math.max(1, Math.round(CURSOR_STEP / this.view.scale));
    const moved = { x: this.cursor.x + x * step, y: this.cursor.y + y * step };
    this.cursor = this.actions.clamp(moved);
    this.view.reveal(this.cursor);
    if (this.pen) this.actions.move(this.cursor);
    this.actions.hover(this.cursor, true);
  }

  #enter() {
    if (!this.cursor) this.setCursor(true);
    else if (this.pen) this.#liftPen();
    else this.#dropPen("Enter");
  }

  #dropPen(key) {
    if (this.pen) return;
    this.pen = key;
    this.actions.start(this.cursor, false);
    this.actions.hover(this.cursor, true);
  }

  #liftPen() {
    if (!this.pen) return;
    this.pen = null;
    this.actions.finish();
  }

  #escape() {
    if (!this.pen) return this.setCursor(false);
    this.pen = null;
    this.actions.cancel();
  }
}

const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

/** Return the middle of two fingers and their distance. */
function fingersOf(pointers) {
  const [one, other] = [...pointers.values()];
  return {
    x: (one.x + other.x) / 2,
    y: (one.y + other.y) / 2,
    distance: Math.max(1, Math.hypot(one.x - other.x, one.y - other.y)),
  };
}
