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
