"""Fill the holes of photographs with a trained generator.

A mask file is white (255) where the hole is; inside, `valid` is 1 where a pixel is known and 0 in
the hole. Known pixels come back bit for bit.
"""

from __future__ import annotations

import time
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from data_prep.errors import PipelineError
from data_prep.progress import Progress, say
from data_prep.storage import open_store

if TYPE_CHECKING:
    from PIL import Image
    from torch import nn

TILE = 512  # pixels of side that go through the generator at once; bounds the memory
OVERLAP = 0.25  # of a tile's side, over which neighbours fade into each other
HOLE_FROM = 128  # a mask's grey value from which a pixel is hole
FEW_KNOWN = 0.05  # below this known share the mask is probably inverted

# How a result is saved, by extension. Lossless wherever the format can be.
_SAVE: dict[str, dict[str, Any]] = {
    ".png": {},
    ".webp": {"lossless": True, "exact": True},
    ".tif": {"compression": "tiff_deflate"},
    ".tiff": {"compression": "tiff_deflate"},
    ".jpg": {"quality": 95, "subsampling": 0},
    ".jpeg": {"quality": 95, "subsampling": 0},
}
_JPEG = (".jpg", ".jpeg")
_MODES = ("1", "L", "LA", "P", "RGB", "RGBA")  # 8 bits a channel, grey or RGB


def inpaint_arrays(
    generator: nn.Module, images: NDArray[np.uint8], valid: NDArray[np.uint8]
) -> NDArray[np.uint8]:
    """Composites uint8 [N, H, W, 3]: the images with their holes filled.

    `images` is uint8 [N, H, W, 3], `valid` uint8 [N, H, W] in {0, 1}; they go through the generator
    as one batch. Raises PipelineError if the model's output is not finite.
    """
    return _composite(images, valid, _predict(generator, images, valid))


def inpaint_large(
    generator: nn.Module, image: NDArray[np.uint8], valid: NDArray[np.uint8], tile: int = TILE
) -> NDArray[np.uint8]:
    """Composite uint8 [H, W, 3] of one image of any size, by tiles of `tile` x `tile` pixels.

    Only tiles with a hole are run. Where tiles overlap they are blended with weights that rise
    linearly from a tile's rim, so no seam shows. `image` uint8 [H, W, 3], `valid` uint8 [H, W].
    """
    height, width = valid.shape
    boxes = [
        (slice(y, min(y + tile, height)), slice(x, min(x + tile, width)))
        for y, x in product(_starts(height, tile), _starts(width, tile))
    ]
    boxes = [box for box in boxes if not valid[box].all()]
    if any(not valid[box].any() for box in boxes):
        say(
            f"A hole covers a whole tile of {tile} pixels, which then sees nothing to go on:"
            " a larger --tile gives a better result and takes more memory."
        )
    total = np.zeros((height, width, 3), np.float32)
    weights = np.zeros((height, width, 1), np.float32)
    with Progress("inpaint", len(boxes), "tiles") as progress:
        for done, box in enumerate(boxes, 1):
            ramps = (_ramp(part, side, tile) for part, side in zip(box, valid.shape, strict=True))
            weight = np.outer(*ramps)[..., None]
            total[box] += weight * _predict(generator, image[box][None], valid[box][None])[0]
            weights[box] += weight
            progress.update(done)
    total /= np.maximum(weights, 1e-12)  # 0 where no tile ran: there is no hole
    return _composite(image, valid, total)


def inpaint_photograph(
    generator: nn.Module,
    image: Image.Image,
    mask: Image.Image,
    tile: int = TILE,
    name: str = "the image",
    mask_name: str = "the mask",
) -> Image.Image:
    """`image` with the white part of `mask` filled, in the same size.

    Grey stays grey and an alpha channel is kept; a palette becomes RGB. The mask counts as hole
    from 128 up. Without a hole the image comes back as it is. Raises PipelineError when sizes
    differ, no pixel is known, or the image has more than 8 bits a channel or other colours than
    RGB; says on standard error what looks wrong about a mask. The names are for the messages.
    """
    from PIL import Image

    if image.mode not in _MODES:
        raise PipelineError(
            f"{name} is a picture of mode {image.mode}: convert it to 8-bit RGB or grey first."
        )
    if mask.size != image.size:
        raise PipelineError(
            f"{mask_name} is {mask.width} x {mask.height} pixels but {name} is"
            f" {image.width} x {image.height}: give a mask of the picture's size."
        )
    valid = _valid_from_mask(mask, mask_name)
    if valid.all():
        say(f"{mask_name} has no hole (white, 255, is hole): the picture comes back as it is.")
        return image
    known = float(valid.mean())
    if known == 0:
        raise PipelineError(
            f"{mask_name} is white everywhere, so no pixel of the picture is known: white is the"
            " hole; leave black what is to be kept."
        )
    if known < FEW_KNOWN:
        say(
            f"{mask_name} leaves only {known:.1%} of the picture known: white is the hole;"
            " if it is meant the other way round, invert the mask."
        )
    alpha = image.convert("RGBA").getchannel("A") if _has_alpha(image) else None
    grey = image.mode in ("1", "L", "LA")
    colours = image.convert("RGBA").convert("RGB") if alpha else image.convert("RGB")
    filled = Image.fromarray(inpaint_large(generator, np.asarray(colours), valid, tile))
    if grey:
        filled = filled.convert("L")  # equal channels give exactly their value
    if alpha is not None:
        filled.putalpha(alpha)
    return filled


def inpaint_files(
    image: Path, mask: Path, out: Path, *, root: str, model: str = "", tile: int = TILE
) -> dict[str, Any]:
    """Fill `image`'s hole and write it to `out`; what was done, as JSON values.

    `model` names the model (see `load_model`). Raises PipelineError with one sentence for
    whatever is wrong with a file or the model; nothing is written then.
    """
    options = _SAVE.get(out.suffix.lower())
    if options is None:
        raise PipelineError(
            f"cannot write {str(out)!r}: name it with one of the extensions {', '.join(_SAVE)}."
        )
    if tile < 64:
        raise PipelineError(f"--tile is {tile}: give at least 64 pixels.")
    start = time.monotonic()
    picture, hole = _open(image), _open(mask)
    if out.suffix.lower() in _JPEG and _has_alpha(picture):
        raise PipelineError(
            f"{image} has an alpha channel, which {out.suffix} cannot hold: write a .png or .webp."
        )
    generator, used = load_model(root, model)
    result = inpaint_photograph(generator, picture, hole, tile, str(image), str(mask))
    filled = result is not picture  # without a hole it comes back as it is
    if out.suffix.lower() in _JPEG:
        say(f"{out.suffix} is lossy, so known pixels change a little too: .png keeps them exactly.")
        result = result.convert("L" if result.mode in ("1", "L") else "RGB")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        result.save(out, icc_profile=picture.info.get("icc_profile"), **options)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise PipelineError(f"cannot write {out}: {reason}; choose another path.") from error
    return {
        "filled": filled,
        "out": str(out),
        "width": result.width,
        "height": result.height,
        "model": used,
        "seconds": round(time.monotonic() - start, 2),
    }


def load_model(root: str, reference: str = "") -> tuple[nn.Module, str]:
    """The generator that `reference` names, ready to run, and what to call it.

    `reference` is "" (the champion of the root), `models:/NAME@champion`, `models:/NAME/VERSION`,
    or the path or URI of a run's folder (or of the `model` folder in it).
    """
    if not reference or reference.startswith("models:/"):
        from dpnet.register import find_record

        store = open_store(root)
        record = find_record(store, reference)
        folder, used = record["run"]["folder"], f"{record['model']} version {record['version']}"
    elif reference.startswith("runs/") and open_store(root).exists(f"{reference}/model/model.json"):
        store, folder, used = open_store(root), reference.rstrip("/"), reference
    else:
        top, _, folder = reference.rstrip("/").removesuffix("/model").rpartition("/")
        store, used = open_store(top or "."), reference
        if not store.exists(f"{folder}/model/model.json"):
            raise PipelineError(
                f"{reference!r} holds no model: give a run's folder (ROOT/runs/NAME), or"
                " models:/NAME@champion with the --root it is registered in."
            )
    from dpnet.weights import load_generator

    return on_fastest_device(load_generator(store, folder)), used


def on_fastest_device(generator: nn.Module) -> nn.Module:
    """The generator on the GPU where there is one."""
    import torch

    return generator.to("cuda" if torch.cuda.is_available() else "cpu")


def _predict(
    generator: nn.Module, images: NDArray[np.uint8], valid: NDArray[np.uint8]
) -> NDArray[np.float32]:
    """The raw prediction, float32 [N, H, W, 3] in [0, 255]."""
    import torch

    device = next((p.device for p in generator.parameters()), torch.device("cpu"))
    with torch.inference_mode():
        image_N3HW = torch.from_numpy(np.array(images)).to(device).permute(0, 3, 1, 2)
        valid_N1HW = torch.from_numpy(np.array(valid)).to(device)[:, None]
        raw_N3HW = generator(image_N3HW.float() / 255, valid_N1HW.float())
        prediction = raw_N3HW.float().permute(0, 2, 3, 1).cpu().numpy()
    if not np.isfinite(prediction).all():
        raise PipelineError(
            "the model predicts values that are not finite: its training has failed; use an"
            " earlier version or train again."
        )
    result: NDArray[np.float32] = prediction * np.float32(255)
    return result


def _composite(
    image: NDArray[np.uint8], valid: NDArray[np.uint8], prediction: NDArray[np.float32]
) -> NDArray[np.uint8]:
    """The image where it is known, the prediction (0 to 255) rounded where it is not."""
    filled = np.clip(np.rint(prediction), 0, 255).astype(np.uint8)
    return np.where(valid[..., None] > 0, image, filled)


def _starts(side: int, tile: int) -> list[int]:
    """Where the tiles of one axis begin: evenly spread, overlapping by OVERLAP or more."""
    if side <= tile:
        return [0]
    step = tile - int(tile * OVERLAP)
    count = 1 + -(-(side - tile) // step)
    return [round(i * (side - tile) / (count - 1)) for i in range(count)]


def _ramp(part: slice, side: int, tile: int) -> NDArray[np.float32]:
    """Weights of a tile's pixels along one axis: linear to 1 from each rim inside the image."""
    fade = np.float32(int(tile * OVERLAP) + 1)
    at = np.arange(part.start, part.stop, dtype=np.float32)
    weight = np.ones_like(at)
    if part.start > 0:
        weight = np.minimum(weight, (at - part.start + 1) / fade)
    if part.stop < side:
        weight = np.minimum(weight, (part.stop - at) / fade)
    return weight


def _valid_from_mask(mask: Image.Image, name: str) -> NDArray[np.uint8]:
    """Uint8 [H, W] in {0, 1} of a mask picture, white = hole = 0."""
    from PIL import Image

    if _has_alpha(mask):  # what is transparent is not painted, whatever its colour
        black = Image.new("RGBA", mask.size, (0, 0, 0, 255))
        mask = Image.alpha_composite(black, mask.convert("RGBA"))
    grey = np.asarray(mask.convert("L"))
    between = float(((grey > 0) & (grey < 255)).mean())
    if between > 0:
        say(
            f"{name} is not pure black and white ({between:.1%} of it is grey): a pixel counts as"
            f" hole from {HOLE_FROM} up."
        )
    return (grey < HOLE_FROM).astype(np.uint8)


def _has_alpha(image: Image.Image) -> bool:
    return image.mode in ("LA", "RGBA") or "transparency" in image.info


def _open(path: Path) -> Image.Image:
    """The picture in a file, decoded and upright."""
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image)
    except FileNotFoundError:
        raise PipelineError(f"{path} does not exist: check the path.") from None
    except (IsADirectoryError, PermissionError) as error:
        raise PipelineError(f"{path} cannot be read: {error.strerror}.") from None
    except Image.DecompressionBombError as error:
        raise PipelineError(f"{path} is too large to open: {error}") from None
    except (OSError, ValueError, SyntaxError) as error:
        raise PipelineError(
            f"{path} is not a picture that can be read: give a whole JPEG, PNG or WebP file."
        ) from error
