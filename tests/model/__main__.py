"""`python -m tests.model`: the model against the product for as many steps as you like.

Exits with 0 if the product is as the model, with 1 at the first step in which it is not, and then says which command
repeats it.
"""

# ruff: noqa: T201  # a command

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from sqlalchemy import create_engine, make_url, text

from leases import LeaseStore
from tests import postgres
from tests.model import volume
from tests.model.product import Product, on_postgresql, on_sqlite

EVERY_S = 5.0
"""How often progress is printed."""


@contextmanager
def opened(url: str) -> Iterator[Product]:
    """A product on SQLite in memory, on a server of our own (`postgresql`), or on a new database of a server."""
    if url == "sqlite":
        with on_sqlite() as product:
            yield product
        return
    if url == "postgresql":
        with postgres.running() as server, opened(server.url.render_as_string(hide_password=False)) as product:
            yield product
        return
    server_url = make_url(url).set(drivername="postgresql+psycopg")
    maintenance = create_engine(server_url, isolation_level="AUTOCOMMIT")
    name = f"leases_model_{time.time_ns()}"
    with maintenance.connect() as connection:
        connection.execute(text(f"CREATE DATABASE {name} TEMPLATE template0"))
    try:
        own = server_url.set(database=name).render_as_string(hide_password=False)
        with LeaseStore(own) as store:
            store.migrate()
        with on_postgresql(own) as product:
            yield product
    finally:
        with maintenance.connect() as connection:
            connection.execute(text(f"DROP DATABASE {name} WITH (FORCE)"))
        maintenance.dispose()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.model", description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=200_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--url", default="sqlite", help="sqlite, postgresql, or the URL of a PostgreSQL server's database"
    )
    parser.add_argument("--look-every", type=int, default=volume.LOOK_EVERY, help="steps between looks at all tables")
    given = parser.parse_args()
    shown_at = time.monotonic()

    def progress(figures: volume.Figures) -> None:
        nonlocal shown_at
        if time.monotonic() - shown_at >= EVERY_S:
            shown_at = time.monotonic()
            print(f"{figures.steps:10,} steps, {figures.rate:,.0f}/s, {figures.grants:,} grants", flush=True)

    with opened(given.url) as product:
        try:
            figures = volume.run(
                product, steps=given.steps, seed=given.seed, look_every=given.look_every, progress=progress
            )
        except volume.Failed as failure:
            print("\n".join(volume.tell(entry) for entry in failure.story))
            print(f"\n{type(failure.why).__name__}: {failure.why}\n")
            where = "" if given.url == "sqlite" else f" --url {shlex.quote(given.url)}"
            print(f"step {failure.step} of seed {failure.seed}; this repeats it:")
            print(f"  python -m tests.model --seed {failure.seed} --steps {failure.step}{where}")
            return 1
    print(f"\n{'rule':32}{'steps':>10}{'refused':>10}")
    for name, count in figures.by_rule.most_common():
        print(f"{name:32}{count:10,}{figures.refused[name]:10,}")
    print(
        f"{figures.steps:,} steps in {figures.elapsed_s:.1f} s, {figures.rate:,.0f}/s; {figures.grants:,} grants, "
        f"{figures.events:,} events; no difference"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
