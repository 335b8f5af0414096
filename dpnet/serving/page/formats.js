// What the first bytes of a picture file say about it.

/** Return "JPEG", "PNG" or "WebP", or "" for another format. */
export async function formatOf(file) {
  const text = await textAt(file, 0, 12);
  if (text.startsWith("\xff\xd8\xff")) return "JPEG";
  if (text.startsWith("\x89PNG")) return "PNG";
  return text.startsWith("RIFF") && text.endsWith("WEBP") ? "WebP" : "";
}

/**
 * Return whether the server may refuse a picture that the browser can show: it may be animated,
 * or have more than 8 bits a channel or other colours than a screen.
 */
export async function isUnusual(file) {
  const look = { JPEG: isUnusualJpeg, PNG: isUnusualPng, WebP: isAnimatedWebp }[await formatOf(file)];
  return look ? look(file) : true;
}

/** Return whether a PNG file has an opaque palette that begins with black, as label maps have. */
export async function hasPaletteOfLabels(file) {
  if ((await formatOf(file)) !== "PNG") return false;
  const [colours] = await bytesAt(file, 25, 1); // 3: a palette
  let found = false;
  for await (const { kind, start } of chunksOf(file)) {
    if (kind === "tRNS") return false;
    if (kind === "PLTE") found = numberOf(await bytesAt(file, start, 3)) === 0;
  }
  return found && colours === 3;
}

async function isUnusualPng(file) {
  const [bits] = await bytesAt(file, 24, 1); // of the first chunk, which is always IHDR
  if (bits > 8) return true;
  for await (const { kind } of chunksOf(file)) if (kind === "acTL") return true; // moments
  return false;
}

/** Yield the chunks of a PNG file before its pixels. */
async function* chunksOf(file) {
  for (let at = 8; at + 12 <= file.size; ) {
    const kind = await textAt(file, at + 4, 4);
    if (kind === "IDAT") return;
    const length = numberOf(await bytesAt(file, at, 4));
    yield { kind, start: at + 8, length };
    at += 12 + length;
  }
}

/** Walk from segment to segment to the one with the size, and look at its bits and channels. */
async function isUnusualJpeg(file) {
  for (let at = 2; at + 10 <= file.size; ) {
    const bytes = await bytesAt(file, at, 10);
    const [mark, kind] = bytes;
    if (mark !== 0xff || kind === 0xda) return false; // 0xda: the pixels
    const isSize = kind >= 0xc0 && kind <= 0xcf && ![0xc4, 0xc8, 0xcc].includes(kind);
    if (isSize) return bytes[4] > 8 || bytes[9] > 3;
    at += kind === 0xff ? 1 : 2 + numberOf(bytes.subarray(2, 4)); // 0xff may be repeated
  }
  return false;
}

async function isAnimatedWebp(file) {
  const [flags] = await bytesAt(file, 20, 1);
  return (await textAt(file, 12, 4)) === "VP8X" && Boolean(flags & 2);
}

async function bytesAt(file, start, count) {
  return new Uint8Array(await file.slice(start, start + count).arrayBuffer());
}

async function textAt(file, start, count) {
  return String.fromCharCode(...(await bytesAt(file, start, count)));
}

const numberOf = (bytes) => bytes.reduce((sum, byte) => sum * 256 + byte, 0);
