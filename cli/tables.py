"""Tables for people, by rich: they fit 80 columns. Every text that came from a database passes through `shown`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from leases.cli.text import ago, duration, shown
from leases.model import DEFAULT_POOL, AuditEntry, Checkpoint, Grant, LeaseInfo, State, WorkerInfo

STYLES = {
    State.HELD: "green",
    State.EXPIRED: "bold red",
    State.PAUSED: "yellow",
    State.FREE: "",
    State.RESTING: "yellow",
    State.RETIRED: "dim",
}

_LONGEST_DOCUMENT = 1000


class _Console(Console):
    def on_broken_pipe(self) -> None:
        raise  # called where a BrokenPipeError is being handled; `Group.invoke` knows what to do


def print_human(*what: Any) -> None:
    """Print rich objects to stdout: 80 columns where there is no terminal, and colour only where there is one."""
    console = _Console(file=sys.stdout, highlight=False, markup=False, emoji=False)
    for each in what:
        console.print(each)


def cell(text: object, style: str = "") -> Text:
    return Text("" if text is None else shown(str(text)), style)


def _table(*headers: str, rows: Iterable[Sequence[Text]]) -> Table:
    """A table without lines. A header's mark: `>` aligns to the right; `*` may be broken over several lines."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for header in headers:
        breaks = header.endswith("*")
        table.add_column(
            header.rstrip(">*"),
            justify="right" if header.endswith(">") else "left",
            no_wrap=not breaks,
            overflow="fold",
        )
    for row in rows:
        table.add_row(*row)
    return table


def state_cell(info: LeaseInfo) -> Text:
    return cell(info.state, STYLES[info.state])


def left(info: LeaseInfo) -> str:
    """The time left on a lease, negative once it has expired; or of a rest; nothing if nobody holds it."""
    if info.state is State.RESTING:
        return duration(info.available_at - info.seen_at)
    return "" if info.remaining is None else duration(info.remaining)


def _age(info: LeaseInfo) -> str:
    """For how long the stream has been as it is."""
    if info.owner is not None:
        since = info.acquired_at or info.seen_at
    else:
        since = info.retired_at or info.paused_at or info.available_at
    return duration(info.seen_at - since) if since <= info.seen_at else "-"


def lease_table(page: Sequence[LeaseInfo]) -> Table:
    pools = any(info.pool != DEFAULT_POOL for info in page)
    return _table(
        "STREAM*",
        "STATE",
        "OWNER*",
        "TOKEN>",
        "LEFT>",
        "AGE>",
        *(("POOL*",) if pools else ()),
        rows=(
            (
                cell(info.stream_id),
                state_cell(info),
                cell(info.owner or "-"),
                cell(info.fencing_token),
                cell(left(info), "red" if info.owner is not None and not info.live else ""),
                cell(_age(info)),
                *((cell(info.pool),) if pools else ()),
            )
            for info in page
        ),
    )


def lease_card(info: LeaseInfo, checkpoint: Checkpoint | None) -> Table:
    """All about one stream, a line each."""
    now = info.seen_at
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")

    def line(name: str, text: str, style: str = "") -> None:
        table.add_row(name, cell(text, style))

    line("stream", info.stream_id)
    line("state", info.state, STYLES[info.state])
    line("owner", info.owner or "nobody")
    line("token", str(info.fencing_token))
    if info.remaining is not None:
        over = info.remaining <= timedelta(0)
        line("lease", f"expired {duration(-info.remaining)} ago" if over else f"{duration(info.remaining)} left")
    if info.owner is not None and info.acquired_at is not None:
        line("acquired", ago(info.acquired_at, now))
    line("pool", info.pool)
    if info.paused_at is not None:
        line("paused", f"{ago(info.paused_at, now)} by {info.paused_by}{_because(info.pause_reason)}", "yellow")
    if info.retired_at is not None:
        line("retired", ago(info.retired_at, now))
    if info.owner is None and info.available_at > now:
        line("available", ago(info.available_at, now))
    if info.failures:
        line("failures", f"{info.failures} in a row", "red")
    if info.last_error:
        line("last error", info.last_error, "red")
    if checkpoint is not None:
        written = json.dumps(checkpoint.checkpoint, ensure_ascii=False)
        if len(written) > _LONGEST_DOCUMENT:
            written = f"{written[:_LONGEST_DOCUMENT]}… ({len(written)} characters; --json has all)"
        line("checkpoint", written)
        line("", f"written {ago(checkpoint.updated_at, now)} under token {checkpoint.fencing_token}")
    line("registered", ago(info.registered_at, now))
    return table


def _because(reason: str | None) -> str:
    return f": {reason}" if reason else ""


def grant_table(grants: Sequence[Grant], now: datetime) -> Table:
    return _table(
        "TOKEN>",
        "OWNER*",
        "GRANTED>",
        "FOR>",
        "ENDED",
        rows=(
            (
                cell(grant.fencing_token),
                cell(grant.owner),
                cell(ago(grant.granted_at, now)),
                cell(duration(_over(grant, now) - grant.granted_at)),
                _end(grant, now),
            )
            for grant in grants
        ),
    )


def _over(grant: Grant, now: datetime) -> datetime:
    if grant.ended_at is not None:
        return grant.ended_at
    return min(now, grant.expires_at or now)


def _end(grant: Grant, now: datetime) -> Text:
    if grant.end_reason is not None:
        return cell(grant.end_reason)
    if grant.expires_at is not None and grant.expires_at <= now:
        return cell("expired", STYLES[State.EXPIRED])
    return cell("live", STYLES[State.HELD])


WORKER_STYLES = {"active": "green", "draining": "yellow", "dead": "bold red"}


def worker_table(found: Sequence[WorkerInfo], shares: Mapping[str, int]) -> Table:
    pools = len({info.pool for info in found}) > 1 or any(info.pool not in (None, DEFAULT_POOL) for info in found)
    return _table(
        "WORKER*",
        "STATE",
        "HELD>",
        "SHARE>",
        "CAPACITY>",
        "LAST BEAT>",
        *(("POOL*",) if pools else ()),
        rows=(
            (
                cell(info.worker_id),
                cell(_state(info), WORKER_STYLES[_state(info)]),
                cell(f"{info.lease_count:,}" if info.live else "-"),
                cell(f"{shares[info.worker_id]:,}" if info.live and info.worker_id in shares else "-"),
                cell("-" if info.capacity is None else f"{info.capacity:,}"),
                cell("" if info.beaten_at is None else ago(info.beaten_at, info.seen_at)),
                *((cell(info.pool or "-"),) if pools else ()),
            )
            for info in found
        ),
    )


def _state(info: WorkerInfo) -> str:
    return info.state if info.live else "dead"


def audit_table(entries: Sequence[AuditEntry], now: datetime) -> Table:
    return _table(
        "WHEN>",
        "ACTOR*",
        "ACTION",
        "STREAM*",
        "TOKEN",
        "REASON*",
        rows=(
            (
                cell(ago(entry.at, now)),
                cell(entry.actor),
                cell(entry.action),
                cell(entry.stream_id or "(all)"),
                cell(_tokens(entry)),
                cell(entry.reason),
            )
            for entry in entries
        ),
    )


def _tokens(entry: AuditEntry) -> str:
    if entry.token_before == entry.token_after:
        return "" if entry.token_after is None else str(entry.token_after)
    return f"{entry.token_before} → {entry.token_after}"
