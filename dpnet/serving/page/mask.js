// The hole: one byte for each pixel at the photo's own size, 0 is known and 255 is the hole.
// This file knows no page. All edges are hard, and all tests of pixels are in whole numbers,
// so that another program can compute the same mask.

export const HOLE = 255;
const TILE = 128; // undo stores changed tiles of this side
const UNDO_BYTES = 64 * 2 ** 20;

export class Mask {
  /** Make an empty mask of this size. */
  constructor(width, height) {
    this.width = width;
    this.height = height;
    this.pixels = new Uint8Array(width * height);
    this.columns = Math.ceil(width / TILE);
    this.counts = new Int32Array(this.columns * Math.ceil(height / TILE)); // hole pixels of a tile
    this.total = 0;
    this.past = [];
    this.future = [];
    this.before = null; // the tiles of the current step as they were
  }

  /** Begin a step that undo takes back as one. */
  begin() {
    this.end();
    this.before = new Map();
  }

  /** End the step, and keep it for undo if it changed a pixel. */
  end() {
    const tiles = this.before;
    this.before = null;
    if (!tiles?.size) return;
    this.past.push(tiles);
    this.future = [];
    this.#forget();
  }

  /** Take the current step back and forget it. Return the changed rectangle. */
  cancel() {
    const tiles = this.before ?? new Map();
    this.before = null;
    this.#swap(tiles);
    return this.#area(tiles);
  }

  /** Take the last step back. Return the changed rectangle, or null if there is no step. */
  undo() {
    this.end();
    return this.#move(this.past, this.future);
  }

  /** Do the last undone step again. Return the changed rectangle, or null. */
  redo() {
    this.end();
    return this.#move(this.future, this.past);
  }

  /** Return how many bytes undo and redo keep. */
  undoBytes() {
    return [...this.past, ...this.future].reduce((sum, tiles) => sum + bytesOf(tiles), 0);
  }

  /**
   * Set every pixel whose centre is at most half of `diameter` from the line between the centres
   * of two pixels. Return the changed rectangle.
   */
  line(from, to, diameter, value) {
    const reach = Math.floor(diameter / 2);
    const top = Math.max(0, Math.min(from.y, to.y) - reach);
    const bottom = Math.min(this.height - 1, Math.max(from.y, to.y) + reach);
    for (let y = top; y <= bottom; y++) {
      const span = spanOfLine(from, to, diameter, y);
      if (span) this.#fill(y, span[0], span[1], value);
    }
    const left = Math.min(from.x, to.x) - reach;
    const right = Math.max(from.x, to.x) + reach;
    return this.#clipped(left, top, right, bottom);
  }

  /** Set the rectangle between two pixels, both included. Return the changed rectangle. */
  box(from, to, value) {
    const [left, right] = [Math.min(from.x, to.x), Math.max(from.x, to.x)];
    const area = this.#clipped(left, Math.min(from.y, to.y), right, Math.max(from.y, to.y));
    for (let y = area.y; y < area.y + area.height; y++) {
      this.#fill(y, area.x, area.x + area.width - 1, value);
    }
    return area;
  }

  /** Make the hole known and the known part the hole. */
  invert() {
    return this.#whole((rows, tile, size) => {
      this.#keep(tile);
      for (const row of rows) {
        for (let place = 0; place < row.length; place++) row[place] = HOLE - row[place];
      }
      return size - this.counts[tile];
    });
  }

  /** Remove the whole hole. */
  clear() {
    return this.#whole((rows, tile) => {
      if (!this.counts[tile]) return 0;
      this.#keep(tile);
      for (const row of rows) row.fill(0);
      return 0;
    });
  }

  /** Take the pixels of another mask of the same size. */
  load(pixels) {
    return this.#whole((rows, tile) => {
      const others = this.#rows(tile, pixels);
      if (rows.every((row, place) => equal(row, others[place]))) return this.counts[tile];
      this.#keep(tile);
      rows.forEach((row, place) => row.set(others[place]));
      return others.reduce((sum, row) => sum + holesOf(row), 0);
    });
  }

  /** Change every tile in one step. `change` returns the tile's new number of hole pixels. */
  #whole(change) {
    this.begin();
    for (let tile = 0; tile < this.counts.length; tile++) {
      const rows = this.#rows(tile);
      this.#setCount(tile, change(rows, tile, rows.length * rows[0].length));
    }
    this.end();
    return { x: 0, y: 0, width: this.width, height: this.height };
  }

  /** Set the pixels of a row from `left` to `right`, both included. */
  #fill(y, left, right, value) {
    left = Math.max(0, left);
    right = Math.min(this.width - 1, right);
    const firstTile = Math.floor(y / TILE) * this.columns;
    for (let x = left; x <= right; ) {
      const column = Math.floor(x / TILE);
      const end = Math.min(right, column * TILE + TILE - 1);
      this.#fillInTile(firstTile + column, y * this.width + x, y * this.width + end, value);
      x = end + 1;
    }
  }

  #fillInTile(tile, first, last, value) {
    const pixels = this.pixels;
    if (value === 0 && !this.counts[tile]) return;
    let changed = 0;
    for (let index = first; index <= last; index++) changed += pixels[index] === value ? 0 : 1;
    if (!changed) return;
    this.#keep(tile);
    pixels.fill(value, first, last + 1);
    this.#setCount(tile, this.counts[tile] + (value === HOLE ? changed : -changed));
  }

  #setCount(tile, count) {
    this.total += count - this.counts[tile];
    this.counts[tile] = count;
  }

  /** Remember a tile as it is, once in a step. */
  #keep(tile) {
    if (this.before && !this.before.has(tile)) this.before.set(tile, this.#pack(tile));
  }

  #box(tile) {
    const x = (tile % this.columns) * TILE;
    const y = Math.floor(tile / this.columns) * TILE;
    const [right, bottom] = [Math.min(this.width, x + TILE), Math.min(this.height, y + TILE)];
    return { x, y, right, bottom };
  }

  /** Return the rows of a tile, as parts of the mask's own memory or of another mask's. */
  #rows(tile, pixels = this.pixels) {
    const { x, y, right, bottom } = this.#box(tile);
    const rows = [];
    for (let row = y; row < bottom; row++) {
      rows.push(pixels.subarray(row * this.width + x, row * this.width + right));
    }
    return rows;
  }

  /** Return a tile's pixels as bits; one number if all of them are equal. */
  #pack(tile) {
    if (this.counts[tile] === 0) return 0;
    const rows = this.#rows(tile);
    if (this.counts[tile] === rows.length * rows[0].length) return HOLE;
    const stride = Math.ceil(rows[0].length / 8);
    const bits = new Uint8Array(stride * rows.length);
    rows.forEach((row, place) => packRow(row, bits, place * stride));
    return bits;
  }

  #unpack(tile, packed) {
    const rows = this.#rows(tile);
    const stride = Math.ceil(rows[0].length / 8);
    let count = 0;
    rows.forEach((row, place) => {
      if (typeof packed === "number") row.fill(packed);
      else unpackRow(packed, place * stride, row);
      count += holesOf(row);
    });
    this.#setCount(tile, count);
  }

  /** Exchange stored tiles with the mask's own. */
  #swap(tiles) {
    for (const [tile, packed] of tiles) {
      tiles.set(tile, this.#pack(tile));
      this.#unpack(tile, packed);
    }
  }

  #move(source, target) {
    const tiles = source.pop();
    if (!tiles) return null;
    this.#swap(tiles);
    target.push(tiles);
    return this.#area(tiles);
  }

  /** Forget the oldest steps beyond the bound of memory; the last step always stays. */
  #forget() {
    while (this.past.length > 1 && this.undoBytes() > UNDO_BYTES) this.past.shift();
  }

  #area(tiles) {
    const boxes = [...tiles.keys()].map((tile) => this.#box(tile));
    if (!boxes.length) return { x: 0, y: 0, width: 0, height: 0 };
    const left = Math.min(...boxes.map((box) => box.x));
    const top = Math.min(...boxes.map((box) => box.y));
    const right = Math.max(...boxes.map((box) => box.right));
    const bottom = Math.max(...boxes.map((box) => box.bottom));
    return { x: left, y: top, width: right - left, height: bottom - top };
  }

  #clipped(left, top, right, bottom) {
    const [x, y] = [Math.max(0, left), Math.max(0, top)];
    const width = Math.max(0, Math.min(this.width - 1, right) - x + 1);
    return { x, y, width, height: Math.max(0, Math.min(this.height - 1, bottom) - y + 1) };
  }

  /** Return whether the rectangle of a tile around a pixel has no hole. */
  emptyAt(x, y) {
    return !this.counts[Math.floor(y / TILE) * this.columns + Math.floor(x / TILE)];
  }
}

function bytesOf(tiles) {
  let sum = 0;
  for (const packed of tiles.values()) sum += 64 + (packed.length ?? 0); // 64: the entry itself
  return sum;
}

function equal(one, other) {
  for (let place = 0; place < one.length; place++) if (one[place] !== other[place]) return false;
  return true;
}

function holesOf(row) {
  let sum = 0;
  for (let place = 0; place < row.length; place++) sum += row[place] & 1;
  return sum;
}

/** Write a row of 0 and 255 as bits, the first pixel in the highest bit, as PNG does. */
export function packRow(row, bits, start) {
  for (let place = 0; place < row.length; place++) {
    bits[start + (place >> 3)] |= row[place] & (128 >> (place & 7));
  }
}

function unpackRow(bits, start, row) {
  for (let place = 0; place < row.length; place++) {
    row[place] = -((bits[start + (place >> 3)] >> (7 - (place & 7))) & 1); // -1 is 255 in a byte
  }
}

/** Return the first and last pixel of row `y` that a thick line covers, or null. */
export function spanOfLine(from, to, diameter, y) {
  let [left, right] = estimate(from, to, diameter / 2, y);
  if (left > right) return null;
  // The estimate has rounding errors, the whole numbers of `covers` have none.
  left = Math.floor(left) - 1;
  right = Math.ceil(right) + 1;
  while (left <= right && !covers(from, to, diameter, left, y)) left++;
  while (right > left && !covers(from, to, diameter, right, y)) right--;
  return left <= right ? [left, right] : null;
}

/** Return about where a row meets the two round ends and the straight part of a thick line. */
function estimate(from, to, radius, y) {
  const spans = [from, to].map((end) => roundSpan(end, radius, y));
  spans.push(straightSpan(from, to, radius, y));
  const found = spans.filter(([left, right]) => left <= right);
  if (!found.length) return [1, 0];
  return [Math.min(...found.map(([left]) => left)), Math.max(...found.map(([, right]) => right))];
}

function roundSpan(centre, radius, y) {
  const rest = radius * radius - (y - centre.y) ** 2;
  if (rest < 0) return [1, 0];
  return [centre.x - Math.sqrt(rest), centre.x + Math.sqrt(rest)];
}

function straightSpan(from, to, radius, y) {
  const [vx, vy, wy] = [to.x - from.x, to.y - from.y, y - from.y];
  const length = Math.hypot(vx, vy);
  if (!length) return [1, 0];
  // Across: |wx * vy - wy * vx| <= radius * length. Along: 0 <= wx * vx + wy * vy <= length ** 2.
  const across = between(vy, wy * vx - radius * length, wy * vx + radius * length);
  const along = between(vx, -wy * vy, length * length - wy * vy);
  return [
    from.x + Math.max(across[0], along[0]),
    from.x + Math.min(across[1], along[1]),
  ];
}

/** Return the interval of x with `low <= factor * x <= high`. */
function between(factor, low, high) {
  if (factor === 0) return low <= 0 && high >= 0 ? [-Infinity, Infinity] : [1, 0];
  return factor > 0 ? [low / factor, high / factor] : [high / factor, low / factor];
}

/** Return whether the centre of a pixel is at most half a diameter from a line. */
function covers(from, to, diameter, x, y) {
  const [vx, vy, wx, wy] = [to.x - from.x, to.y - from.y, x - from.x, y - from.y];
  const square = vx * vx + vy * vy;
  const along = wx * vx + wy * vy;
  const limit = diameter * diameter;
  if (along <= 0) return 4 * (wx * wx + wy * wy) <= limit;
  if (along >= square) return 4 * ((x - to.x) ** 2 + (y - to.y) ** 2) <= limit;
  return 4 * (wx * vy - wy * vx) ** 2 <= limit * square;
}
