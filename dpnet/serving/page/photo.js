// A photo as the page shows it: upright, with smaller copies, so that a large one moves smoothly.

const SMALL = 1600; // copies are made until the longer side is at most this

export class Photo {
  /** Take the levels: the whole photo first, each later one half as large. */
  constructor(file, levels) {
    this.file = file;
    this.levels = levels;
    this.width = levels[0].width;
    this.height = levels[0].height;
  }

  /** Return the smallest copy that has at least `scale` of the photo's pixels. */
  level(scale) {
    const fits = this.levels.filter((level) => level.width / this.width >= scale);
    return fits.at(-1) ?? this.levels[0];
  }

  /** Give the memory back. */
  close() {
    for (const level of this.levels) level.close();
  }
}

/** Return "JPEG", "PNG" or "WebP" by the first bytes of a file, or "" for another format. */
export async function formatOf(file) {
  const bytes = new Uint8Array(await file.slice(0, 12).arrayBuffer());
  const text = String.fromCharCode(...bytes);
  if (text.startsWith("\xff\xd8\xff")) return "JPEG";
  if (text.startsWith("\x89PNG")) return "PNG";
  return text.startsWith("RIFF") && text.endsWith("WEBP") ? "WebP" : "";
}

/** Decode a picture file. The browser turns it upright by its EXIF orientation. */
export async function openPhoto(file) {
  const levels = [await createImageBitmap(file)];
  while (Math.max(levels.at(-1).width, levels.at(-1).height) > SMALL) {
    levels.push(await half(levels.at(-1)));
  }
  return new Photo(file, levels);
}

function half(bitmap) {
  return createImageBitmap(bitmap, {
    resizeWidth: Math.max(1, Math.round(bitmap.width / 2)),
    resizeHeight: Math.max(1, Math.round(bitmap.height / 2)),
    resizeQuality: "medium",
  });
}
