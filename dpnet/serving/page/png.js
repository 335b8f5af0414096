// Masks as PNG files. They are written here and not by a canvas, because a canvas of a large
// photo does not fit into some browsers, and one bit for each pixel is exact.

import { hasPaletteOfLabels } from "./formats.js";
import { HOLE, packRow } from "./mask.js";
import { percent } from "./page.js";

const SIGNATURE = [137, 80, 78, 71, 13, 10, 26, 10];
const STRIP = 2 ** 20; // pixels that are decoded at a time
const MOST_GREY = 0.5; // share of grey pixels above which a picture is not a mask

/** Return a mask as a PNG file with one bit for each pixel; white is the hole. */
export async function encodeMask(mask) {
  const header = new Uint8Array(13);
  const view = new DataView(header.buffer);
  view.setUint32(0, mask.width);
  view.setUint32(4, mask.height);
  header[8] = 1; // bits for each pixel; the other fields are 0: grey, no interlace
  const stream = new Blob([packedRows(mask)]).stream();
  const packed = await new Response(
    stream.pipeThrough(new CompressionStream("deflate")),
  ).arrayBuffer();
  const parts = [chunk("IHDR", header), chunk("IDAT", new Uint8Array(packed))];
  return new Blob([new Uint8Array(SIGNATURE), ...parts, chunk("IEND", new Uint8Array(0))], {
    type: "image/png",
  });
}

/** Return the rows as bits, each after a 0 that says: no filter. */
function packedRows(mask) {
  const { width, height, pixels } = mask;
  const stride = Math.ceil(width / 8) + 1;
  const rows = new Uint8Array(stride * height);
  for (let y = 0; y < height; y++) {
    packRow(pixels.subarray(y * width, (y + 1) * width), rows, y * stride + 1);
  }
  return rows;
}

function chunk(name, data) {
  const bytes = new Uint8Array(data.length + 12);
  const view = new DataView(bytes.buffer);
  view.setUint32(0, data.length);
  for (let place = 0; place < 4; place++) bytes[4 + place] = name.charCodeAt(place);
  bytes.set(data, 8);
  view.setUint32(data.length + 8, checksum(bytes.subarray(4, data.length + 8)));
  return bytes;
}

const TABLE = Array.from({ length: 256 }, (_, start) => {
  let value = start;
  for (let bit = 0; bit < 8; bit++) value = (value >>> 1) ^ (value & 1 ? 0xedb88320 : 0);
  return value;
});

/** Return the CRC-32 that ends each part of a PNG file. */
function checksum(bytes) {
  let value = -1;
  for (const byte of bytes) value = TABLE[(value ^ byte) & 255] ^ (value >>> 8);
  return ~value >>> 0;
}

/**
 * Return the pixels of a mask file, 255 in the hole. White is the hole, by the rule of
 * `dpnet inpaint`. Throw an Error with a sentence if the file has another size or is no mask.
 */
export async function decodeMask(file, width, height) {
  let bitmap;
  try {
    bitmap = await createImageBitmap(file, {
      colorSpaceConversion: "none",
      premultiplyAlpha: "none",
    });
  } catch {
    throw new Error("This mask cannot be read: open an undamaged PNG file.");
  }
  try {
    if (bitmap.width !== width || bitmap.height !== height) {
      throw new Error(
        `The mask is ${bitmap.width} x ${bitmap.height} pixels but the photo is ` +
          `${width} x ${height}: open the mask of this photo.`,
      );
    }
    const isHole = ruleFor(bitmap, await hasPaletteOfLabels(file));
    const pixels = new Uint8Array(width * height);
    eachStrip(bitmap, (data, first) => {
      for (let place = 0; place < data.length; place += 4) {
        if (isHole(data, place)) pixels[first + place / 4] = HOLE;
      }
    });
    return pixels;
  } finally {
    bitmap.close();
  }
}

/**
 * Look at all pixels, and return the function that says which are the hole. Throw an Error with a
 * sentence if they are mostly grey. With a `palette` of labels, colours are labels.
 */
function ruleFor(bitmap, palette) {
  let [most, seesThrough, opaque, white, black] = [0, false, false, false, false];
  let [greys, faint, coloured] = [0, 0, false]; // grey pixels by colour, and by alpha
  eachStrip(bitmap, (data) => {
    for (let place = 0; place < data.length; place += 4) {
      if (isGrey(data[place + 3])) faint++;
      if (data[place + 3] < 128) {
        seesThrough = true;
        continue;
      }
      opaque = true;
      most = Math.max(most, data[place], data[place + 1], data[place + 2]);
      if (isGrey(sum(data, place) / 3)) greys++;
      if (palette && 3 * data[place] !== sum(data, place)) coloured = true;
      if (sum(data, place) >= 384) white = true;
      else black = true;
    }
  });
  const isOpaque = (data, place) => data[place + 3] >= 128;
  if (coloured) return (data, place) => sum(data, place) > 0;
  const byAlpha = seesThrough && opaque && white !== black;
  const grey = (byAlpha ? faint : greys) / (bitmap.width * bitmap.height);
  if (grey > MOST_GREY) {
    throw new Error(
      `The mask is mostly grey (${percent(grey)} of it), so it is not a mask: open a picture that ` +
        "is black and white.",
    );
  }
  if (byAlpha) return isOpaque;
  const least = most === 1 ? 1 : 384; // a mask of only 0 and 1
  return (data, place) => isOpaque(data, place) && sum(data, place) >= least;
}

/** Return whether a level is between an eighth and seven eighths of white. */
const isGrey = (level) => level > 31.875 && level < 223.125;

function sum(data, place) {
  return data[place] + data[place + 1] + data[place + 2];
}

/** Decode a bitmap in strips, because its whole RGBA is four times as large as the mask. */
function eachStrip(bitmap, visit) {
  const rows = Math.max(1, Math.floor(STRIP / bitmap.width));
  const canvas = document.createElement("canvas");
  canvas.width = bitmap.width;
  canvas.height = Math.min(rows, bitmap.height);
  const context = canvas.getContext("2d", { willReadFrequently: true });
  for (let y = 0; y < bitmap.height; y += rows) {
    const height = Math.min(rows, bitmap.height - y);
    context.clearRect(0, 0, canvas.width, canvas.height);
    context.drawImage(bitmap, 0, -y);
    visit(context.getImageData(0, 0, bitmap.width, height).data, y * bitmap.width);
  }
}
