"""The commands that only look: list, show, history, audit."""

from __future__ import annotations

from collections.abc import Iterator

import click

from leases.cli.command import REFUSED, USAGE, Command, Failed, say
from leases.cli.context import OWNER, POOL, STREAM, Settings, clock, common_options
from leases.cli.render import as_object, print_json
from leases.cli.tables import audit_table, grant_table, lease_card, lease_table, print_human
from leases.cli.text import parse_time
from leases.errors import LeaseNotHeld
from leases.model import LeaseInfo, State
from leases.store import LeaseStore

PAGE = 500
SHOWN_GRANTS = 5

LIMIT = click.IntRange(min=1, max=1_000_000)
limit_option = click.option(
    "--limit", type=LIMIT, default=100, show_default=True, metavar="N", help="At most so many, the latest."
)


@click.command(
    "list",
    cls=Command,
    short_help="List streams: who holds them, for how long yet.",
    example="""\
leases list
leases list 'orders/*' --state expired
leases list --owner host-1:4121:9f3a2b1c --json
""",
)
@click.argument("glob", required=False, type=STREAM)
@click.option("--owner", type=OWNER, metavar="OWNER", help="Only what this owner holds.")
@click.option("--pool", type=POOL, metavar="POOL", help="Only the streams of this pool.")
@click.option("--state", type=click.Choice([state.value for state in State]), help="Only streams in this state.")
@click.option("--limit", type=LIMIT, metavar="N", help="At most so many. [default: all]")
@common_options
@click.pass_obj
def list_command(
    settings: Settings, glob: str | None, owner: str | None, pool: str | None, state: str | None, limit: int | None
) -> None:
    """List streams: who holds them, and for how long yet.

    GLOB chooses by stream_id: `*` is any text, `?` any character. LEFT is the time left on the lease, negative once
    it has expired; AGE is how long the stream has been as it is.
    """
    with settings.opened() as store:
        found = False
        for page in _pages(store, limit, glob=glob, owner=owner, pool=pool, state=state):
            found = True
            if settings.json:
                for info in page:
                    print_json(as_object(info))
            else:
                print_human(lease_table(page))
    if not found:
        chosen = glob or owner or pool or state
        say("no stream matches" if chosen else "no streams yet; `leases register STREAM` adds one")


def _pages(store: LeaseStore, limit: int | None, **filters: str | None) -> Iterator[list[LeaseInfo]]:
    after, left = None, limit
    while left is None or left > 0:
        size = PAGE if left is None else min(PAGE, left)
        page = store.list(**filters, after=after, limit=size)
        if page:
            yield page
        if len(page) < size:
            return
        after = page[-1].stream_id
        left = None if left is None else left - size


def every(store: LeaseStore, **filters: str | None) -> list[LeaseInfo]:
    """All streams that match, page after page."""
    return [info for page in _pages(store, None, **filters) for info in page]


def look(store: LeaseStore, stream: str) -> LeaseInfo:
    """One stream as it stands, or `LeaseNotHeld`."""
    info = store.get(stream)
    if info is None:
        raise LeaseNotHeld(f"no stream is called {stream!r}; `leases list` shows them", stream_id=stream)
    return info


@click.command("show", cls=Command, short_help="Show all about one stream.", example="leases show orders/7")
@click.argument("stream", type=STREAM)
@common_options
@click.pass_obj
def show(settings: Settings, stream: str) -> None:
    """Show all about one stream: its lease, its checkpoint and its last grants."""
    with settings.opened() as store:
        info = look(store, stream)
        checkpoint = store.checkpoint(stream)
        grants = store.grants(stream, limit=SHOWN_GRANTS)
    if settings.json:
        print_json(
            {
                **as_object(info),
                "checkpoint": None if checkpoint is None else as_object(checkpoint),
                "grants": [as_object(grant) for grant in grants],
            }
        )
        return
    print_human(lease_card(info, checkpoint))
    if grants:
        print_human("", grant_table(grants, info.seen_at))


@click.command(
    "history",
    cls=Command,
    short_help="Show who has owned a stream; or who did at a time.",
    example="""\
leases history orders/7
leases history orders/7 --at 14:02
leases history orders/7 --at 2026-03-01T14:02:00+01:00
""",
)
@click.argument("stream", type=STREAM)
@click.option("--at", "at_text", metavar="TIME", help="Only who owned it then: an ISO time, or HH:MM (UTC).")
@limit_option
@common_options
@click.pass_obj
def history(settings: Settings, stream: str, at_text: str | None, limit: int) -> None:
    """Show who has owned a stream, the latest first; or who owned it at a time."""
    with settings.opened() as store:
        now = clock(store)
        at = note = None
        if at_text is not None:
            read = parse_time(at_text, now)
            if read is None:
                raise Failed(USAGE, f"{at_text!r} is no time; write 14:02 or 2026-03-01T14:02:00Z")
            at, note = read
        look(store, stream)
        grants = store.grants(stream, at=at, limit=limit)
    if at is not None and not grants:
        raise Failed(REFUSED, f"nobody owned {stream!r} at {at:%Y-%m-%d %H:%M:%S} UTC")
    if note:
        say(note)
    if not grants:
        say(f"nobody has owned {stream!r} yet")
    elif settings.json:
        for grant in grants:
            print_json(as_object(grant))
    else:
        print_human(grant_table(grants, now))


@click.command(
    "audit",
    cls=Command,
    short_help="Show what operators did.",
    example="""\
leases audit
leases audit orders/7 --limit 5
""",
)
@click.argument("stream", required=False, type=STREAM)
@limit_option
@common_options
@click.pass_obj
def audit(settings: Settings, stream: str | None, limit: int) -> None:
    """Show what operators did, the latest first; to one stream, or to all."""
    with settings.opened() as store:
        now = clock(store)
        entries = store.audit(stream_id=stream, limit=limit)
        if stream is not None and not entries:
            look(store, stream)
    if not entries:
        say("no operator has done anything" + (f" to {stream!r}" if stream else ""))
    elif settings.json:
        for entry in entries:
            print_json(as_object(entry))
    else:
        print_human(audit_table(entries, now))
