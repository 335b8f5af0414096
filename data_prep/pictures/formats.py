"""Image formats that the pipeline reads: extensions, first bytes, Pillow's names."""

from __future__ import annotations

import re
from functools import cache

_JPEG = ("jpg", "jpeg", "jpe", "jfif")
_PPM = ("ppm", "pgm", "pbm", "pnm")
_JPEG2000 = ("jp2", "j2k", "jpx", "jpf")
EXTENSIONS = frozenset(
    (*_JPEG, *_PPM, *_JPEG2000, "png", "apng", "webp", "tif", "tiff", "bmp", "gif", "avif")
)  # lower case
# Image files that Pillow cannot read. They count as failed photos, so that people hear of them.
UNREADABLE = frozenset(
    ("heic", "heif", "jxl", "psd", "dng", "cr2", "cr3", "nef", "arw", "orf", "raf", "rw2", "exr")
)
# Files of other kinds, which are ignored without a look. A name with any other ending, such as
# `a.jpg?w=640`, `b.jpg_large` or `2021-07-14 12.30.45`, may belong to an image.
_OTHERS = (
    # text, settings, programs and pages
    "txt text md rst log json jsonl ndjson geojson xml xmp yaml yml toml ini cfg conf properties"
    " csv tsv html htm xhtml mhtml css js ts map php asp aspx jsp py pyc ipynb r m c h cpp hpp cc"
    " cs java go rs rb pl sh bash bat cmd ps1 sql tex bib srt vtt url desktop lnk plist list lst"
    # documents and drawings
    " pdf doc docx odt rtf xls xlsx ods ppt pptx odp epub mobi djvu ps eps ai svg svgz indd sketch"
    # sound and video
    " mp3 m4a aac wav flac ogg oga opus wma mid mp4 m4v mov avi mkv webm wmv flv mpg mpeg 3gp mts"
    # archives and disks
    " zip tar gz tgz bz2 tbz2 xz txz zst lz4 7z rar jar iso dmg deb rpm apk cab exe msi dll so"
    # numbers, models and tables
    " npy npz mat h5 hdf5 hdf pkl pickle pt pth ckpt safetensors onnx pb tflite tfrecord tfrecords"
    " parquet feather arrow orc avro db sqlite sqlite3 lmdb mdb rec idx cls pyd ten"
    # 3D, maps, letters, checksums
    " obj ply stl glb gltf fbx las laz shp shx dbf prj ttf otf woff woff2"
    " md5 sha1 sha256 sha512 sum sfv sig asc crc torrent lock pid"
)
OTHER_EXTENSIONS = frozenset(_OTHERS.split())
LOOK = 64  # bytes that show whether a file is an image
_FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "PPM", "JPEG2000", "AVIF")
_MAGIC = re.compile(
    rb"\xff\xd8\xff|\x89PNG\r\n\x1a\n|GIF8[79]a|RIFF....WEBP|II[*+]\0|MM\0[*+]"
    rb"|BM............[\x0c\x28\x34\x38\x40\x6c\x7c]\0\0\0|P[1-6]\s+[0-9#]"
    rb"|\0\0\0\x0cjP  \r\n\x87\n|\xff\x4f\xff\x51|....ftypavi[fs]",
    re.DOTALL,
)

_UNREADABLE_MAGIC = re.compile(
    rb"....ftyp(?:hei[cxms]|hev[cxms]|mif1|msf1)|8BPS\0[\x01\x02]|\xff\x0a|\0\0\0\x0cJXL |v/1\x01",
    re.DOTALL,
)  # HEIF, Photoshop, JPEG XL, EXR


_HEIC = re.compile(rb"....ftyp(?:hei[cxms]|hev[cxms]|(?:mif1|msf1).{4,48}hei[cx])", re.DOTALL)


def is_heic(head: bytes) -> bool:
    """Return whether a file's first `LOOK` bytes are those of HEIC, which phones write."""
    return _HEIC.match(head) is not None


def looks_like_image(head: bytes) -> bool:
    """Return whether a file's first bytes (32 or more) are those of a known image format."""
    return _MAGIC.match(head) is not None


def is_picture_name(name: str) -> bool:
    """Return whether a file is an image by the extension of its name, also one we cannot read."""
    extension = name.rpartition(".")[2].lower()
    return extension in EXTENSIONS or extension in UNREADABLE


def is_other_name(name: str) -> bool:
    """Return whether a file is of another known kind than an image, by its extension."""
    return name.rpartition(".")[2].lower() in OTHER_EXTENSIONS


def looks_like_photo(head: bytes) -> bool:
    """Return whether a file's first `LOOK` bytes are those of an image, also of one we cannot read.

    The latter fails later, so that people hear of it.
    """
    return looks_like_image(head) or _UNREADABLE_MAGIC.match(head) is not None


@cache
def pillow_formats() -> tuple[str, ...]:
    """Return the formats that the installed Pillow can read, under Pillow's names."""
    from PIL import Image

    Image.init()
    # `Limits` replaces Pillow's own limit, which cannot be set per call and does not name the size.
    Image.MAX_IMAGE_PIXELS = None
    return tuple(name for name in _FORMATS if name in Image.OPEN)
