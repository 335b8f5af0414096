"""Keep votes in the root that a server serves, if it can be written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from data_prep.core.errors import ConfigError, PipelineError
from dpnet.registry.promotion import person
from dpnet.registry.votes import MOST_REASON, keep_vote
from dpnet.serving.limits import RequestError
from dpnet.serving.models import Registry, Source


class Votes:
    """The votes of a server."""

    def __init__(self, source: Source, unwritable: str = "") -> None:
        """Prepare to keep votes.

        Args:
            source: where the versions come from.
            unwritable: why its root cannot be written, or "".
        """
        self._source, self._unwritable = source, unwritable

    def why_not(self) -> str:
        """Return a sentence that says why no vote can be kept, or ""."""
        if not isinstance(self._source, Registry):
            return "this server has no registry, so it keeps no votes: start it with --root."
        return self._unwritable

    def keep(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Keep a vote and return its record.

        Args:
            values: winner, loser, blind and reason.

        Raises:
            RequestError: a field is wrong, or there is no root that can be written.
        """
        source = self._source
        if (why := self.why_not()) or not isinstance(source, Registry):
            raise RequestError(409, why)
        blind, reason = values.get("blind", False), values.get("reason", "")
        if not isinstance(blind, bool) or not isinstance(reason, str):
            raise RequestError(400, "blind is true or false, and reason is a text: correct them.")
        if len(reason) > MOST_REASON:
            raise RequestError(400, f"reason is too long: give at most {MOST_REASON} characters.")
        model, winner = self._version(values, "winner")
        other, loser = self._version(values, "loser")
        if model != other:
            raise RequestError(400, "winner and loser are of two models: compare one model's.")
        try:
            vote = keep_vote(
                source.store, model, winner, loser, blind=blind, reason=reason, by=person()
            )
        except ConfigError as error:
            raise RequestError(400, str(error)) from None
        except (PipelineError, OSError) as error:
            raise RequestError(503, f"the vote cannot be kept: {error}") from None
        return asdict(vote)

    def _version(self, values: Mapping[str, Any], name: str) -> tuple[str, int]:
        id = values.get(name)
        found = self._source.find(id) if isinstance(id, str) else None
        if found is None:
            raise RequestError(400, f"{name} names no version: give an id that /api/models lists.")
        model, _, number = found.id.rpartition("@")
        return model, int(number)
