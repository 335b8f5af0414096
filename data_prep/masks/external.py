"""The recipe `external`: masks from sets of files, such as the NVIDIA irregular set.

The whole set decides whether black or white is the hole. Published sets differ, and the hole of a
single mask may be larger than the rest.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from data_prep.core.errors import ConfigError
from data_prep.masks.mask_file import PackedMask
from data_prep.masks.plan import Candidate, ratio_bin
from data_prep.masks.read_files import POLARITIES, MaskFile
from data_prep.masks.recipes import EXTERNAL, generator

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from data_prep.masks.settings import Polarity

MAJORITY = 0.75  # the share of the files that must agree on the hole's colour


@dataclass(frozen=True, slots=True)
class FileMask:
    """A mask to store: its candidate, and the file that it comes from."""

    candidate: Candidate
    key: str
    packed: PackedMask
    flips: tuple[bool, bool]  # left to right, upside down

    def mask(self, size: int) -> NDArray[np.uint8]:
        """Return the hole mask, uint8 [size, size] in {0, 255}."""
        import numpy as np

        mask = self.packed.mask(size)
        return np.ascontiguousarray(
            mask[:: -1 if self.flips[1] else 1, :: -1 if self.flips[0] else 1]
        )


class FilePool:
    """The file masks that one split draws from."""

    def __init__(self, masks: Sequence[tuple[str, PackedMask]], flips: bool) -> None:
        self._masks, self._flips = masks, flips

    def __len__(self) -> int:
        return len(self._masks)

    def candidate(self, seed: int, index: int) -> Candidate:
        """Return candidate `index` of a stream, without its pixels."""
        _, packed = self._masks[_place(seed, index, len(self._masks))]
        return Candidate(EXTERNAL, seed, index, packed.ratio, packed.touches)

    def mask(self, candidate: Candidate) -> FileMask:
        """Return a candidate with its pixels."""
        seed, index = candidate.seed, candidate.index
        key, packed = self._masks[_place(seed, index, len(self._masks))]
        flips = (False, False)
        if self._flips:
            left_right, up_down = generator(f"mask/{EXTERNAL}/{seed}", index).random(2) < 0.5
            flips = (bool(left_right), bool(up_down))
        return FileMask(candidate, key, packed, flips)


def _place(seed: int, index: int, count: int) -> int:
    """Return the file that mask `index` uses: all files in random order, then in another one."""
    return int(_order(seed, index // count, count)[index % count])


@lru_cache(maxsize=4)
def _order(seed: int, turn: int, count: int) -> NDArray[np.int64]:
    return generator(f"files/{seed}", turn).permutation(count)


def find_polarity(files: Sequence[MaskFile], where: str) -> tuple[Polarity, str]:
    """Find the hole's colour in these files, and return it with a sentence that explains it.

    Most masks have more known pixels than hole, and most edge pixels are known. So a file votes for
    white holes if its share of white, in all and along the edges, is together below 1. Raises
    ConfigError if the files do not agree.
    """
    masks = [file for file in files if file.kind == "mask"]
    votes: Counter[Polarity] = Counter()
    for file in masks:
        if file.white + file.rim != 1:
            votes["white-hole" if file.white + file.rim < 1 else "black-hole"] += 1
    polarity: Polarity = max(POLARITIES, key=lambda p: votes[p])
    white, black = votes["white-hole"], votes["black-hole"]
    if votes[polarity] < MAJORITY * len(masks):
        raise ConfigError(
            f"masks.external: the colour of the holes in {where} is not clear. Of {len(masks)} mask"
            f" files {white} are mostly black and {black} mostly white, counting area and edges:"
            " set masks.external_polarity to white-hole or black-hole."
        )
    hole, other = ("white", "black") if polarity == "white-hole" else ("black", "white")
    sentence = (
        f"masks: {hole} is the hole in {where}, because {votes[polarity]} of its {len(masks)}"
        f" masks are mostly {other}, counting area and edges. If that is wrong, set"
        " masks.external_polarity."
    )
    return polarity, sentence


def make_pools(
    masks: Sequence[tuple[MaskFile, PackedMask]], splits: Sequence[str], flips: bool, where: str
) -> dict[str, FilePool]:
    """Divide the file masks that fall in a ratio bin among `splits`.

    Two splits share no file: the content of a file decides its split, about half for each.

    Args:
        masks: all masks of the source.
        splits: that draw from files.
        flips: flip masks at random.
        where: the source, for messages.

    Raises:
        ConfigError: a split gets no mask.
    """
    usable = [(file, packed) for file, packed in masks if ratio_bin(packed.ratio)]
    pools = {
        split: FilePool(
            [
                (file.key, packed)
                for file, packed in usable
                if int(file.sha256[:8], 16) % len(splits) == number
            ],
            flips,
        )
        for number, split in enumerate(splits)
    }
    for split, pool in pools.items():
        if not len(pool):
            raise ConfigError(
                f"masks.external: {where} has no mask between 1 and 60 % hole for the {split}"
                f" split. Of {len(masks)} masks {len(usable)} are in that range, and each goes to"
                f" one of the splits {', '.join(splits)}. Give more files, another"
                " masks.external_polarity or a smaller masks.external_dilate."
            )
    return pools
