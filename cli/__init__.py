"""The `leases` command: parse, call, render.

Each command is a thin skin over a method of `LeaseStore`; what it prints is in `render` and `tables`, how it fails in
`command`.
"""

from __future__ import annotations

import click

from leases.cli.command import Group
from leases.cli.context import common_options

PLACES = {
    "migrate": "leases.cli.upkeep:migrate",
    "list": "leases.cli.watch:list_command",
    "show": "leases.cli.watch:show",
    "steal": "leases.cli.act:steal",
    "expire": "leases.cli.act:expire",
    "release": "leases.cli.act:release",
    "pause": "leases.cli.upkeep:pause",
    "resume": "leases.cli.upkeep:resume",
    "register": "leases.cli.upkeep:register",
    "retire": "leases.cli.upkeep:retire",
    "history": "leases.cli.watch:history",
    "audit": "leases.cli.watch:audit",
    "prune": "leases.cli.upkeep:prune",
    "raise-tokens": "leases.cli.upkeep:raise_tokens",
    "workers": "leases.cli.fleet:workers",
    "drain": "leases.cli.fleet:drain",
    "work": "leases.cli.work:work",
    "run": "leases.cli.run:run",
    "demo": "leases.cli.demo.command:demo",
}


@click.group(
    cls=Group,
    places=PLACES,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 80},
    epilog="The database comes from --url, or else $LEASES_DATABASE_URL, or else is a SQLite file in your data "
    "directory; @FILE stands for a file's first line. "
    "Exit codes: 0 done, 1 refused or not held, 2 usage, 3 store unavailable, 4 schema.",
)
@common_options
@click.version_option(package_name="leases", message="%(package)s %(version)s")
def main() -> None:
    """Who may work on a stream right now, and how everybody else's write is refused."""
