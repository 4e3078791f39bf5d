"""The `leases` command: parse, call, render.

Each command is a thin skin over a method of `LeaseStore`; what it prints is in `render`, how it fails in `command`.
"""

from __future__ import annotations

import click

from leases.cli import act, fleet, upkeep, watch
from leases.cli.command import Group
from leases.cli.context import common_options
from leases.cli.demo.command import demo
from leases.cli.run import run
from leases.cli.work import work


@click.group(
    cls=Group,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 80},
    epilog="The database comes from --url, or else $LEASES_DATABASE_URL; @FILE stands for a file's first line. "
    "Exit codes: 0 done, 1 refused or not held, 2 usage, 3 store unavailable, 4 schema.",
)
@common_options
@click.version_option(package_name="leases", message="%(package)s %(version)s")
def main() -> None:
    """Who may work on a stream right now, and how everybody else's write is refused."""


for command in (
    upkeep.migrate,
    watch.list_command,
    watch.show,
    act.steal,
    act.expire,
    act.release,
    upkeep.pause,
    upkeep.resume,
    upkeep.register,
    upkeep.retire,
    watch.history,
    watch.audit,
    upkeep.prune,
    upkeep.raise_tokens,
    fleet.workers,
    fleet.drain,
    work,
    run,
    demo,
):
    main.add_command(command)
