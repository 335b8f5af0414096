"""The models of a server: the champion of a root and its other versions, loaded when needed.

The champion's record is looked at once a second at most, so a promotion needs no restart. If the
new champion cannot be loaded, the old one answers, and `/healthz` says so. Generators are loaded
and used in the thread that computes; the other functions may be called from any thread.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from data_prep.core.errors import ConfigError, PipelineError
from data_prep.core.paths import version_key
from data_prep.core.storage.open import open_store
from data_prep.core.storage.store import Store
from dpnet.inpainting.tiles import on_fastest_device
from dpnet.model import Generator
from dpnet.model_store.find_model import PACKAGED, find_model, find_packaged, is_given, the_root
from dpnet.model_store.records import CHAMPION, find_record, read_record
from dpnet.model_store.weights import load_generator, read_config
from dpnet.registry.overview import list_versions
from dpnet.serving.limits import RequestError

log = logging.getLogger(__name__)

LOOK_S = 1.0  # between two looks at the champion
LIST_S = 5.0  # between two readings of all versions
KEEP = 2  # generators in memory: two versions side by side
_STORAGE_S = 5.0  # the longest time of a request to S3
_LOADING = "no model was loaded yet: ask again soon."


class Version(NamedTuple):
    """A version that a server can use.

    Attributes:
        id: its name in requests and answers, such as dpnet@3.
        name: its name for people.
        digest: of the content of its run, or of its weights.
        store: where its files are.
        folder: of its files.
    """

    id: str
    name: str
    digest: str
    store: Store
    folder: str


class Source(Protocol):
    """The place that the versions come from."""

    follows: bool  # whether the default can change

    def default(self) -> Version:
        """Return the version that answers if none is named. Raises PipelineError if none can."""

    def find(self, id: str) -> Version | None:
        """Return the version with this id, or None."""

    def facts(self) -> list[dict[str, Any]]:
        """Return what is known about each version."""


class OneModel:
    """A source with one version that never changes: a folder, or the packaged weights."""

    follows = False

    def __init__(self, store: Store, folder: str, name: str) -> None:
        digest = read_config(store, folder)[0]["weights_sha256"]
        kind = "packaged" if name == PACKAGED else "model"
        self._version = Version(f"{kind}@{digest[:12]}", name, digest, store, folder)

    def default(self) -> Version:
        """Return the version."""
        return self._version

    def find(self, id: str) -> Version | None:
        """Return the version if it has this id."""
        return self._version if id == self._version.id else None

    def facts(self) -> list[dict[str, Any]]:
        """Return what is known about the version."""
        return [_facts(self._version)]


class Registry:
    """A source with all versions of a root's model; the default is the champion, or a fixed one."""

    def __init__(self, store: Store, reference: str = "") -> None:
        self.store, self._reference = store, reference
        self._quick = store.hurried(_STORAGE_S)
        self.follows = not reference or reference.endswith(f"@{CHAMPION}")
        self.model = ""  # known after the first look
        self._listed: tuple[float, list[dict[str, Any]]] = (float("-inf"), [])

    def default(self) -> Version:
        """Return the champion, or the version that the reference names."""
        try:
            version = self._version(find_record(self._quick, self._reference))
        except OSError as error:
            raise PipelineError(
                f"{self.store.label} cannot be read ({error.strerror or error}): check the storage."
            ) from None
        if not self._reference:  # from now on one small file is read, and no folder
            self._reference = f"models:/{self.model}@{CHAMPION}"
        return version

    def _version(self, record: dict[str, Any]) -> Version:
        self.model, number, run = str(record["model"]), record["version"], record["run"]
        name = f"{self.model} version {number}"
        digest = str(run.get("content_digest", ""))
        return Version(f"{self.model}@{number}", name, digest, self.store, run["folder"])

    def find(self, id: str) -> Version | None:
        """Return the version of the model with this id, or None."""
        if not self.model:
            self.default()
        model, _, number = id.partition("@")
        if model != self.model or not number.isdecimal() or len(number) > 9:
            return None
        try:
            return self._version(read_record(self._quick, version_key(self.model, int(number))))
        except FileNotFoundError:
            return None

    def facts(self) -> list[dict[str, Any]]:
        """Return what is known about each version, newest first, at most some seconds old."""
        at, known = self._listed
        if time.monotonic() - at > LIST_S and self.model:
            known = []
            for each in list_versions(self._quick, self.model):
                version = self._version(
                    read_record(self._quick, version_key(self.model, each["version"]))
                )
                more = {name: each[name] for name in ("version", "state", "hole_psnr")}
                known.insert(0, {**_facts(version), **more})
            self._listed = (time.monotonic(), known)
        return known


def _facts(version: Version) -> dict[str, Any]:
    return {"id": version.id, "name": version.name, "digest": version.digest}


def open_source(root: str | None, reference: str) -> Source:
    """Return the source that the options --root and --model name.

    Raises:
        PipelineError: the model does not exist.
    """
    if reference and not reference.startswith("models:/"):
        return OneModel(*find_model(reference, root))
    registry = Registry(open_store(the_root(root)), reference)
    if not reference and not is_given(root) and (packaged := find_packaged()) is not None:
        try:
            registry.default()
        except PipelineError:
            return OneModel(*packaged, PACKAGED)
    _check_folder(registry.store)
    if reference:
        registry.default()  # a wrong name is reported before anything starts
    return registry


def _check_folder(store: Store) -> None:
    """Check that a root on this machine is a folder. Raises ConfigError."""
    folder = store.local_folder
    if folder is not None and not folder.is_dir():
        wrong = "is a file" if folder.exists() else "does not exist"
        raise ConfigError(
            f"the root {folder} {wrong}: name the folder of a pipeline with --root, or make one"
            " with `dpnet demo`."
        )


class Loaded(NamedTuple):
    """A version with its generator."""

    version: Version
    generator: Generator


class Models:
    """The generators in memory, and the default version."""

    def __init__(
        self,
        source: Source,
        *,
        load: Callable[[Version], Generator] = lambda v: load_on_fastest_device(v),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.source, self._load, self._clock = source, load, clock
        self._lock = threading.Lock()
        self._looked_at = float("-inf")
        self._found: Version | None = None  # the default by the last look
        self._problem = _LOADING
        self._loaded: OrderedDict[str, Loaded] = OrderedDict()
        self._current: Loaded | None = None  # the default that answers
        self._facts: list[dict[str, Any]] = []  # by the last reading

    @property
    def current(self) -> Loaded | None:
        """Return the default version that answers, or None before one was loaded."""
        return self._current

    @property
    def problem(self) -> str:
        """Return a sentence about what is wrong by the last look, or ""."""
        with self._lock:
            return "" if self._problem == _LOADING else self._problem

    def get(self, id: str = "") -> Loaded:
        """Return the version with this id, "" or champion for the default; load it if necessary.

        Call it in the thread that computes.

        Raises:
            RequestError: there is no such version, or it cannot be loaded.
        """
        if id in ("", CHAMPION):
            return self._default()
        if id in self._loaded:
            self._loaded.move_to_end(id)
            return self._loaded[id]
        try:
            version = self.source.find(id)
        except (PipelineError, OSError) as error:
            raise RequestError(503, _sentence(error), 5) from None
        if version is None:
            raise RequestError(
                404, "there is no such model: choose one of the ids that /api/models lists."
            )
        try:
            return self._keep(version)
        except (PipelineError, OSError) as error:
            raise RequestError(503, _sentence(error), 5) from None

    def _default(self) -> Loaded:
        version = self.look()
        current = self._current
        if version is not None and (current is None or current.version != version):
            try:
                current = self._keep(version)
                if self._current is not None:
                    log.info("serve: %s answers now", version.name)
                self._set(current, "")
            except (PipelineError, OSError) as error:
                self._set(current, _sentence(error))
        if current is None:
            raise RequestError(503, self._problem, 5)
        return current

    def _set(self, current: Loaded | None, problem: str) -> None:
        if problem and problem != self._problem and current is not None:
            log.warning("serve: %s still answers: %s", current.version.name, problem)
        with self._lock:
            self._current, self._problem = current, problem

    def _keep(self, version: Version) -> Loaded:
        """Load a version, and forget the one that was not used for the longest time."""
        known = self._loaded.get(version.id)
        if known is None or known.version != version:
            others = [id for id, each in self._loaded.items() if each is not self._current]
            for id in others[: max(0, len(self._loaded) + 1 - KEEP)]:
                del self._loaded[id]
            known = Loaded(version, self._load(version))
            self._loaded[version.id] = known
        self._loaded.move_to_end(version.id)
        return known

    def look(self) -> Version | None:
        """Return the default version by a look that is at most a second old, or None."""
        with self._lock:
            if self._clock() - self._looked_at < LOOK_S:
                return self._found
            self._looked_at = self._clock()
        try:
            found, problem = self.source.default(), ""
        except (PipelineError, OSError) as error:
            found, problem = None, _sentence(error)
        with self._lock:
            if problem or (self._current is not None and self._current.version == found):
                self._problem = problem
            self._found = found or (self._current.version if self._current else None)
            return self._found

    def health(self) -> tuple[Version | None, str]:
        """Return the version that answers, and a sentence about what is wrong, or ""."""
        self.look()
        with self._lock:
            return self._current.version if self._current else None, self._problem

    def listed(self) -> tuple[list[dict[str, Any]], str]:
        """Return what is known about each version, and a sentence about what is wrong, or ""."""
        champion, problem = self.look(), self.problem
        try:
            self._facts = self.source.facts()
        except (PipelineError, OSError) as error:  # the versions that were known are still shown
            problem = problem or _sentence(error)
        found = [
            {**each, "champion": champion is not None and each["id"] == champion.id}
            for each in self._facts
        ]
        return found, problem


def load_on_fastest_device(version: Version) -> Generator:
    """Load the generator of a version to the GPU if there is one."""
    return on_fastest_device(load_generator(version.store, version.folder))


def _sentence(error: Exception) -> str:
    if isinstance(error, OSError):
        return f"the model's files cannot be read ({error.strerror or error}): check the storage."
    return str(error)
