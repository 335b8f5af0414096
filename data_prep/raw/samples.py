"""The samples of a WebDataset tar: which members belong together, and which of them are photos."""

from __future__ import annotations

import re
from collections.abc import Sequence

from data_prep.pictures.formats import is_other_name, is_picture_name
from data_prep.raw.layouts import IGNORED
from data_prep.raw.members import Member

_WORD = re.compile(r"[A-Za-z_][\w-]*")  # a part of an extension such as `seg.png`
# Images that describe another image. Ours, from the names of published sets.
_ABOUT = re.compile(
    r"(mask|seg|label|depth|normals|edge|sketch|trimap|matte|alpha|thumb)[a-z]*[\d_-]*",
    re.IGNORECASE,
)


def stem_of(name: str) -> str:
    """Return the name of a member's sample: its path without the extensions at the end.

    WebDataset cuts at the first dot of the file name. But names such as `22.05.00.jpg` have dots
    in the stem, so a part that does not begin with a letter ends the extensions.
    """
    folder, slash, last = name.rpartition("/")
    parts = last.split(".")
    count = max(1, len(parts) - 1)
    while count > 1 and _WORD.fullmatch(parts[count - 1]):
        count -= 1
    return folder + slash + ".".join(parts[:count])


def images_of(stem: str, sample: Sequence[Member]) -> list[Member]:
    """Return the images of a sample; without one, its first member with a problem.

    Without a known image, members of unknown kinds count as images.

    The first image decides. One called `stem.jpg` is the photo of the sample, and other images
    describe it. Without one, all images with the same extension are photos, such as `left.jpg` and
    `right.jpg`. The other images have a problem that says so.
    """
    images = [member for member in sample if is_picture_name(member.name)]
    images = images or [member for member in sample if not is_other_name(member.name)]
    if not images:
        problem = sample[0].problem or f"{IGNORED}its sample has no image"
        return [sample[0]._replace(problem=problem)]
    kinds = [member.name[len(stem) + 1 :].lower() for member in images]
    plain = [kind for kind in kinds if "." not in kind]
    photos = plain or [kind for kind in kinds if not _is_about(kind)] or kinds
    first = photos[0]
    ending = first.rpartition(".")[2]
    photos = [kind for kind in photos if kind == first or (not plain and kind.endswith(ending))]
    other = f"{IGNORED}its sample has the photo {images[kinds.index(first)].name}"
    return [
        member if kind in photos or member.problem else member._replace(problem=other)
        for member, kind in zip(images, kinds, strict=True)
    ]


def _is_about(kind: str) -> bool:
    return any(_ABOUT.fullmatch(part) for part in kind.split(".")[:-1])
