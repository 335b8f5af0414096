"""Follow a RayJob in a thread: list it once, then watch its changes, through every fault.

A watch is only a way to learn of changes early. Whatever ends it, the next list gives the state.
"""

from __future__ import annotations

import logging
import threading
import time
from typing import Any

from dpnet.training.ray.kube_client import Kube, KubeError

log = logging.getLogger(__name__)

FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 15.0  # between two tries


class Follower:
    """The last known state of a RayJob.

    Attributes:
        job: The RayJob as it was last seen, or None before the first answer.
        gone: Whether it is not there any more.
        error: The error of the last request, or None if it succeeded.
        answered: Time of the last answer, by this process's monotonic clock.
    """

    def __init__(self, kube: Kube, job: dict[str, Any]) -> None:
        self.kube, self.job, self.gone = kube, job, False
        self.error: KubeError | None = None
        self.answered = time.monotonic()
        self._name, self._uid = job["metadata"]["name"], job["metadata"]["uid"]
        self._since = ""  # version up to which changes are known
        self._ended = threading.Event()
        self._wait = FIRST_WAIT_S
        # The thread ends by itself at the end of its watch, and never keeps the process.
        self._thread = threading.Thread(target=self._follow, name="rayjob", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stop following."""
        self._ended.set()

    def _follow(self) -> None:
        while not self._ended.is_set() and not self.gone:
            try:
                self._list()
                while self._since and not self._ended.is_set() and not self.gone:
                    self._watch()
            except KubeError as error:
                self._pause(error)
            except Exception as error:  # of the client's library, whose answers we do not control
                log.debug("the RayJob %s cannot be followed: %r", self._name, error)
                self._pause(KubeError(0, f"{type(error).__name__}: {error}"))

    def _list(self) -> None:
        """Take the present state, and begin to watch from there."""
        found, newest = self.kube.jobs(name=self._name)
        if not found and self._since:
            # A watch from where the last one broke shows how it ended.
            self._answer(of_watch=False)
            return
        self._take(found[0] if found else None)
        self._since = newest
        self._answer(of_watch=False)

    def _watch(self) -> None:
        """Take changes until the watch ends."""
        try:
            for event in self.kube.watch(self._name, self._since):
                job = event["object"]
                if event["type"] == "DELETED":
                    self.job = job if job["metadata"]["uid"] == self._uid else self.job
                    self._take(None)
                elif event["type"] != "BOOKMARK":
                    self._take(job)
                self._answer()
                self._since = job["metadata"]["resourceVersion"]
                if self._ended.is_set() or self.gone:
                    break
        except KubeError as error:
            if error.status != 410:
                raise
            self._since = ""  # too old to continue from: list again
            self._ended.wait(FIRST_WAIT_S)
        self._answer()

    def _take(self, job: dict[str, Any] | None) -> None:
        # One of the same name that somebody made later is not ours.
        if job is None or job["metadata"]["uid"] != self._uid:
            self.gone = True
        else:
            self.job = job

    def _answer(self, of_watch: bool = True) -> None:
        self.answered = time.monotonic()
        if of_watch or not self.error or self.error.verb != "watch":
            self.error, self._wait = None, FIRST_WAIT_S

    def _pause(self, error: KubeError) -> None:
        """Wait before the next try, longer each time, or as long as the server asks."""
        self.error = error
        self._ended.wait(error.wait if error.wait is not None else self._wait)
        self._wait = min(2 * self._wait, LONGEST_WAIT_S)
