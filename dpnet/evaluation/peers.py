"""Other models that are judged on the same pairs: folders of their results, registered versions.

A folder has one picture for each pair, under the pair's name (`FrozenPairs.name`), which
`--export-pairs` gives to the pair's files. This file needs no torch, because a finished evaluation
is skipped without it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

from data_prep.core.digest import content_digest, sha256_bytes, sha256_file
from data_prep.core.errors import ConfigError, ItemError, PipelineError
from data_prep.core.lease import check_leases
from data_prep.core.manifest import StageRef, load_reference
from data_prep.core.storage.store import Store
from data_prep.core.text import printable
from data_prep.pictures.formats import is_picture_name
from dpnet.evaluation.pairs import open_pairs
from dpnet.evaluation.settings import EvaluateSettings
from dpnet.model_store.records import find_record

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from dpnet.model import Generator

    Array = NDArray[np.uint8]

MODEL = "models:/"
_MISSING = "are missing"
_NAMED = 3  # files of a problem that its message names


class Peer(Protocol):
    """A model to compare with."""

    name: str
    digest: str  # of its results or of its weights
    version: str  # models:/MODEL/VERSION, or "" for a folder

    def check(self, names: Sequence[str], side: int, pool: Executor) -> None:
        """Check before the work that the peer has a result for every pair."""

    def load(self) -> None:
        """Load what a worker needs."""

    def composites(
        self, names: Sequence[str], truths: Array, valid: Array, pool: Executor
    ) -> Array:
        """Return the composites of a batch, uint8 [N, H, W, 3].

        Args:
            names: names of the pairs.
            truths: uint8 [N, H, W, 3].
            valid: uint8 [N, H, W], 1 = known.
            pool: threads.
        """


def check_peers(settings: EvaluateSettings, store: Store) -> None:
    """Check that the folders and versions in `evaluate.compare` exist.

    Raises:
        ConfigError: one of them does not.
    """
    for name, place in settings.compare.items():
        if place.startswith(MODEL):
            try:
                find_record(store, place)
            except ConfigError as error:
                raise ConfigError(f"evaluate.compare.{name}: {error}") from None
        elif not Path(place).expanduser().is_dir():
            raise ConfigError(
                f"evaluate.compare.{name} names {place!r}, which is not a folder: give a folder"
                f" with one picture for each pair, or {MODEL}NAME/VERSION."
            )


def check_results(
    settings: EvaluateSettings, images: StageRef, masks: StageRef, store: Store
) -> None:
    """Check that each folder in `evaluate.compare` has a picture for every pair.

    The pairs are known before the training, which can take days. The pictures are not read.

    Args:
        settings: settings of the evaluation.
        images: the images stage.
        masks: the masks stage.
        store: the root.

    Raises:
        ConfigError: some are missing.
        PipelineError: a folder cannot be read.
    """
    folders = {n: place for n, place in settings.compare.items() if not place.startswith(MODEL)}
    if not folders:
        return
    frozen = open_pairs(store, settings, images, masks)
    names = [frozen.name(pair) for pair in frozen.pairs]
    for name, place in sorted(folders.items()):
        there = _pictures(name, place)
        _report(name, len(names), {_MISSING: [each for each in names if each not in there]})


def find_peers(settings: EvaluateSettings, store: Store) -> list[Peer]:
    """Return the peers of `evaluate.compare`, with the digests of what they consist of.

    Raises:
        ConfigError: a folder does not exist, has two pictures of one name, or there is no such
            version.
        PipelineError: a folder cannot be read.
    """
    check_peers(settings, store)
    return [
        _version_of(name, place, store) if place.startswith(MODEL) else _folder_of(name, place)
        for name, place in sorted(settings.compare.items())
    ]


class _File(NamedTuple):
    path: Path
    sha256: str


@dataclass
class FolderPeer:
    """A folder with a picture for each pair, by the pair's name."""

    name: str
    digest: str
    files: Mapping[str, _File]
    version: str = ""

    def check(self, names: Sequence[str], side: int, pool: Executor) -> None:
        """Decode every picture once.

        Raises:
            ConfigError: some are missing, unreadable or of another size.
        """
        problems: dict[str, list[str]] = {}
        found = pool.map(self._problem, names, [side] * len(names))
        for name, problem in zip(names, found, strict=True):
            check_leases()
            if problem:
                problems.setdefault(problem, []).append(name)
        _report(self.name, len(names), problems)

    def load(self) -> None:
        """Load nothing: pictures are read when they are needed."""

    def composites(
        self, names: Sequence[str], truths: Array, valid: Array, pool: Executor
    ) -> Array:
        """Return the folder's pictures in the holes of a batch."""
        import numpy as np

        from dpnet.evaluation.baselines import composite

        return np.stack(list(pool.map(composite, truths, valid, pool.map(self._read, names))))

    def _problem(self, name: str, side: int) -> str:
        """Return what is wrong with a pair's picture, in words that follow a number; "" if fine."""
        if name not in self.files:
            return _MISSING
        try:
            shape = self._read(name).shape
        except (OSError, ItemError):
            return "cannot be read as pictures"
        return "" if shape == (side, side, 3) else f"are not {side} x {side} pixels"

    def _read(self, name: str) -> Array:
        from data_prep.pictures.decoding import decode_rgb
        from data_prep.pictures.limits import STORED

        path, sha256 = self.files[name]
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            raise PipelineError(
                f"{printable(str(path))} was removed during the evaluation, or this machine of the"
                " cluster does not have it: put it on a disk that all machines share."
            ) from None
        if sha256_bytes(data) != sha256:
            raise PipelineError(
                f"{printable(str(path))} was changed during the evaluation: run it again."
            )
        return decode_rgb(data, STORED).rgb


def _report(name: str, pairs: int, problems: Mapping[str, Sequence[str]]) -> None:
    """Raise ConfigError about the pairs whose results cannot be used, if there are any.

    Args:
        name: of the other model.
        pairs: the number of all pairs.
        problems: names of pairs by what is wrong with their results.
    """
    what = "; ".join(
        f"{len(some)} {problem} ({', '.join(some[:_NAMED])}{', …' if some[_NAMED:] else ''})"
        for problem, some in sorted(problems.items())
        if some
    )
    if what:
        raise ConfigError(
            f"the results of {name} do not fit the {pairs:,} pairs: {printable(what)}."
            " Write the pairs with --export-pairs, and give each result the name of its pair."
        )


def _pictures(name: str, place: str) -> dict[str, Path]:
    """Return the pictures in a peer's folder by their names without the ending."""
    folder = Path(place).expanduser().absolute()
    files: dict[str, Path] = {}
    try:
        for path in sorted(folder.iterdir()):
            if not is_picture_name(path.name) or path.name.startswith("."):
                continue
            if path.stem in files:
                raise ConfigError(
                    f"evaluate.compare.{name}: {printable(str(folder))} has several pictures named"
                    f" {printable(path.stem)}: keep one of them."
                )
            files[path.stem] = path
    except OSError as error:
        raise _unreadable(name, folder, error) from error
    return files


def _unreadable(name: str, folder: Path, error: OSError) -> PipelineError:
    return PipelineError(
        f"evaluate.compare.{name}: {printable(str(folder))} cannot be read ({error.strerror}):"
        " check its rights."
    )


def _folder_of(name: str, place: str) -> FolderPeer:
    try:
        files = {
            stem: _File(path, sha256_file(path)) for stem, path in _pictures(name, place).items()
        }
    except OSError as error:
        raise _unreadable(name, Path(place).expanduser(), error) from error
    digest = content_digest((file.path.name, file.sha256) for file in files.values())
    return FolderPeer(name, digest, files)


@dataclass
class VersionPeer:
    """A registered version, which fills the holes of the pairs itself."""

    name: str
    digest: str
    version: str
    store: Store
    folder: str
    generator: Generator | None = None

    def check(self, names: Sequence[str], side: int, pool: Executor) -> None:
        """Check nothing: the version fills the holes of any pair."""

    def load(self) -> None:
        """Load the weights. Raises PipelineError if they cannot be used."""
        from dpnet.inpainting.tiles import on_fastest_device
        from dpnet.model_store.weights import load_generator

        self.generator = on_fastest_device(load_generator(self.store, self.folder))

    def composites(
        self, names: Sequence[str], truths: Array, valid: Array, pool: Executor
    ) -> Array:
        """Return the version's composites of a batch."""
        from dpnet.evaluation.exact import fill_batch

        assert self.generator is not None, "load() comes first"
        return fill_batch(self.generator, truths, valid, pool)


def _version_of(name: str, reference: str, store: Store) -> VersionPeer:
    record = find_record(store, reference)
    folder = record["run"]["folder"]
    # The champion may be another version tomorrow, so the number is recorded.
    version = f"{MODEL}{record['model']}/{record['version']}"
    return VersionPeer(name, load_reference(store, folder).content_digest, version, store, folder)
