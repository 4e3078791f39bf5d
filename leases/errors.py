"""The errors: one tree, fields as well as text, each saying what to do next.

    LeasesError
    ├─ ConfigError (also ValueError)   bad URL, bad durations, bad stream_id
    ├─ LeaseNotHeld                    nothing to act on: no such stream, or nobody holds it
    │  ├─ LeaseLost                    was mine, is no longer
    │  └─ StaleToken                   a fenced write under an old token
    ├─ LeaseHeld                       the stream cannot be had, or a session blocks an operator's action
    └─ StoreError
       ├─ StoreUnavailable             worth a retry
       ├─ OutcomeUnknown               may or may not have happened
       └─ SchemaOutdated               run `leases migrate`

Losing a race is an answer (`None`) of every operation, not an error; only who insists gets `LeaseHeld`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from leases.model import Blocker


class LeasesError(Exception):
    """The root: `except LeasesError` catches all that this library raises by design."""


class ConfigError(LeasesError, ValueError):
    """An argument that can never work: a URL, a duration, a stream_id. Nothing was sent to the database."""


class LeaseNotHeld(LeasesError):
    """The stream is unknown, or nobody holds its lease, or not the one that was named."""

    def __init__(self, message: str, *, stream_id: str) -> None:
        super().__init__(message)
        self.stream_id = stream_id


class LeaseLost(LeaseNotHeld):
    """The lease was held by this session and is no longer: stop working on the stream, open it anew."""

    def __init__(self, stream_id: str, fencing_token: int, reason: str) -> None:
        super().__init__(
            f"the lease on {stream_id!r} (token {fencing_token}) is lost: {reason}; stop, and open the stream again",
            stream_id=stream_id,
        )
        self.fencing_token = fencing_token
        self.reason = reason


class StaleToken(LeaseNotHeld):
    """A write was refused: its token is not that of a live lease. Roll back; this owner's time is over.

    `fencing_token` is the writer's, `current_token` and `current_owner` the table's (None where the stream is
    unknown or free). Equal tokens mean that the lease itself ended: it expired, or was released.
    """

    def __init__(
        self, stream_id: str, fencing_token: int, current_token: int | None, current_owner: str | None
    ) -> None:
        if current_token is None:
            because = "the stream is not registered here"
        elif current_token == fencing_token:
            because = "the lease has ended (expired, released, or its owner's name differs)"
        else:
            because = f"the current token is {current_token}, owner {current_owner or 'nobody'}"
        super().__init__(
            f"write on {stream_id!r} under token {fencing_token} refused: {because}; roll back and stop",
            stream_id=stream_id,
        )
        self.fencing_token = fencing_token
        self.current_token = current_token
        self.current_owner = current_owner


class LeaseHeld(LeasesError):
    """The stream cannot be had: somebody holds it, it is paused or retired, or fenced writes hold its row (`blockers`).

    Raised where the caller insists: `SessionRegistry.open`, an operator's steal. `acquire` and `try_open` return None.
    """

    def __init__(
        self, message: str, *, stream_id: str, owner: str | None = None, blockers: Sequence[Blocker] = ()
    ) -> None:
        super().__init__(message)
        self.stream_id = stream_id
        self.owner = owner
        self.blockers = tuple(blockers)


class StoreError(LeasesError):
    """The database did not do what was asked. The message never holds a password or a statement's values."""


class StoreUnavailable(StoreError):
    """The database cannot be reached or is too busy; nothing was changed. Worth a retry."""


class OutcomeUnknown(StoreError):
    """The connection broke before the answer came: it may or may not have happened.

    Ask again with the same key (`claim_id`, `event_id`), or look (`get`, `grants`): every operation of this
    library may be repeated without harm.
    """


class SchemaOutdated(StoreError):
    """The tables are missing, older, or newer than this code: run `leases migrate`, or upgrade the package."""
