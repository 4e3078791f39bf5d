"""What all commands share: which database, how it is opened, and the kinds of arguments.

The database is given by `--url`, before or after the command's name, or by LEASES_DATABASE_URL; in both, `@FILE` stands
for the first line of a file, so that a password is in no process list. Without either it is a SQLite file in the user's
data directory, which is then named on stderr.
"""

from __future__ import annotations

import getpass
import os
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from platformdirs import user_data_dir
from sqlalchemy import select

from leases import limits
from leases.cli.command import REFUSED, STORE, Failed, say
from leases.cli.text import parse_duration, shown
from leases.dialects import now
from leases.engine import describe, parse
from leases.errors import ConfigError
from leases.store import LeaseStore

URL_VARIABLE = "LEASES_DATABASE_URL"

RETRY_FOR = timedelta(seconds=1)
"""How long a command tries again: an operator would rather be told at once."""

if TYPE_CHECKING:
    ParamType = click.ParamType[Any]
else:
    ParamType = click.ParamType  # older clicks have it without the bracket

CONNECT_TIMEOUT_S = 5

F = TypeVar("F", bound=Callable[..., Any])


@dataclass
class Settings:
    """The options that every command takes."""

    url: str | None = None
    schema: str | None = None
    json: bool = False

    def database_given(self) -> str | None:
        """The URL of the option, of the environment, or of the file that either names."""
        given = self.url or os.environ.get(URL_VARIABLE)
        if not given:
            return None
        if given.startswith("@"):
            given = _first_line(given[1:])
        if any("\ud800" <= character <= "\udfff" for character in given):
            raise ConfigError("the database URL holds bytes that are not UTF-8; write them as %XX")
        return given

    @contextmanager
    def opened(self, *, create: bool = False, retry_for: timedelta | None = None) -> Iterator[LeaseStore]:
        """The store of the database that was asked for; with `create` also where the default one is to be."""
        url = self.database_given()
        if url is None:
            url = _default(create)
        parsed = parse(url)
        if parsed.get_backend_name() == "postgresql" and "connect_timeout" not in parsed.query:
            parsed = parsed.update_query_dict({"connect_timeout": str(CONNECT_TIMEOUT_S)})
        patience = RETRY_FOR if retry_for is None else retry_for
        with LeaseStore(parsed, schema=self.schema, retry_for=patience) as store:
            yield store


def _first_line(name: str) -> str:
    try:
        with open(name, encoding="utf-8") as file:
            line = file.readline(10_000).strip()
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ConfigError(f"cannot read a database URL from the file {name!r}: {why}") from None
    if not line:
        raise ConfigError(f"the first line of the file {name!r} is empty; write the database URL there")
    return line


def _default(create: bool) -> str:
    file = Path(user_data_dir("leases")) / "leases.db"
    say(f"using {file} (give --url or set {URL_VARIABLE} for another database)")
    if create:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise Failed(STORE, f"cannot make {file.parent}: {error.strerror}; give --url") from None
    return f"sqlite:///{file}"


# --- options ---------------------------------------------------------------------------------------------------


def _remember(ctx: click.Context, param: click.Parameter, value: Any) -> None:
    settings = ctx.ensure_object(Settings)
    if value is not None and value is not False:
        setattr(settings, str(param.name), value)


def _not_empty(ctx: click.Context, param: click.Parameter, value: str | None) -> None:
    if value is not None and not value.strip():
        raise click.BadParameter("it is empty", ctx, param)
    _remember(ctx, param, value)


def common_options(command: F, *, url_default: str = f"${URL_VARIABLE}, or a file") -> F:
    """Add --url, --schema and --json; the command takes `@click.pass_obj`."""
    url_help = f"The database, or @FILE: its first line. [default: {url_default}]"
    schema_help = "PostgreSQL's schema of the tables."
    json_help = "Print JSON, one object a line."
    for option in (
        click.option("--json", is_flag=True, expose_value=False, callback=_remember, help=json_help),
        click.option("--schema", metavar="NAME", expose_value=False, callback=_not_empty, help=schema_help),
        click.option("--url", metavar="URL", expose_value=False, callback=_not_empty, help=url_help),
    ):
        command = option(command)
    return command


class Named(ParamType):
    """A stream_id, an owner or a pool: `limits` says what it may be."""

    def __init__(self, name: str, check: Callable[[str], str]) -> None:
        self.name = name
        self._check = check

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        try:
            return self._check(value)
        except ConfigError as error:
            self.fail(str(error), param, ctx)


class Duration(ParamType):
    """`30d`, `12h`, `90m`, `45s`, or a number of seconds."""

    name = "duration"

    def __init__(
        self, check: Callable[[timedelta], timedelta] | None = None, *, zero: bool = False, unit: bool = False
    ) -> None:
        self._check = check
        self._zero = zero
        self._unit = unit

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> timedelta:
        if isinstance(value, timedelta):
            return value
        if self._unit and str(value).strip().replace(".", "", 1).isdigit():
            self.fail(f"{value!r} of what? write {value}d, {value}h, {value}m or {value}s", param, ctx)
        read = parse_duration(str(value))
        if read is None or (self._check is None and not read and not self._zero):
            least = "0 or more" if self._zero else "more than 0"
            self.fail(f"{value!r} is no duration; write 30d, 12h, 90m, 45s or 500ms, {least}", param, ctx)
        try:
            return read if self._check is None else self._check(read)
        except ConfigError as error:
            self.fail(str(error), param, ctx)


class Token(ParamType):
    """A fencing token."""

    name = "integer"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        digits = str(value)
        if not (digits.isascii() and digits.isdigit()) or len(digits) > 19:
            self.fail(f"{value!r} is no fencing token: an integer from 0 to 2**63 - 1", param, ctx)
        try:
            return limits.fencing_token(int(digits))
        except ConfigError as error:
            self.fail(str(error), param, ctx)


def _text(what: str) -> Callable[[str], str]:
    def check(value: str) -> str:
        if not value.strip():
            raise ConfigError(f"{what} is empty")
        return limits.text(what, value)

    return check


STREAM = Named("stream", limits.stream_id)
OWNER = Named("owner", limits.owner)
POOL = Named("pool", limits.pool)
REASON = Named("text", _text("reason"))
TTL = Duration(limits.ttl)
PAUSE = Duration()
AGE = Duration(unit=True)
PAUSE_OR_NONE = Duration(zero=True)


def actor() -> str:
    """Who is at the keyboard: `user@host`."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # no such user: a container with a number only
        user = f"uid {os.getuid()}"
    return f"{user}@{socket.gethostname()}"


actor_option = click.option(
    "--actor",
    type=Named("text", _text("actor")),
    default=actor,
    show_default="user@host",
    help="Who does it, for the audit.",
)
yes_option = click.option("--yes", "-y", is_flag=True, help="Do not ask.")


# --- asking ----------------------------------------------------------------------------------------------------


def can_ask(yes: bool) -> None:
    """Refuse, before anything is looked at, if nobody can be asked."""
    if not yes and not sys.stdin.isatty():
        raise click.UsageError("nobody can be asked, since stdin is not a terminal; pass --yes")


def ask(yes: bool, *lines: str) -> None:
    """Show on stderr what is about to happen and ask whether it may; the last line is the question."""
    if yes:
        return
    for line in lines[:-1]:
        click.echo(shown(line), err=True)
    if not click.confirm(shown(lines[-1]), err=True):
        raise Failed(REFUSED, "nothing was changed")


# --- looking ---------------------------------------------------------------------------------------------------


def clock(store: LeaseStore) -> datetime:
    """The database's time."""
    read: datetime = store.run(lambda connection: connection.execute(select(now())).scalar_one(), read_only=True)
    return read


def where(store: LeaseStore) -> str:
    """The database's name for people."""
    place = describe(store.url)
    return place if store.schema is None else f"{place} (schema {store.schema})"
