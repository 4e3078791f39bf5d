"""The rules of writers who do not call the fence: of a sink in another database, and of any language at all."""

from __future__ import annotations

from sqlalchemy import MetaData, text

from leases import advance_watermark
from leases.errors import StoreError
from leases.fencing import watermark_table
from leases.model import Lease
from tests.model.kinds import GRANT, rule
from tests.model.world import World

WATERMARKS = watermark_table(MetaData())
WRITE = text("INSERT INTO protected VALUES (:stream_id, :token)")


@rule(25, grant=GRANT)
def write_to_a_sink(world: World, grant: Lease) -> None:
    world.both(
        lambda: world.store.run(lambda connection: advance_watermark(connection, WATERMARKS, grant)),
        lambda _: world.model.advance_watermark(grant),
    )


@rule(25, grant=GRANT)
def write_to_a_protected_table(world: World, grant: Lease) -> None:
    given = {"stream_id": grant.stream_id, "token": grant.fencing_token}

    def of_product() -> bool:
        try:
            world.store.run(lambda connection: connection.execute(WRITE, given))
        except StoreError as refusal:
            if "leases: " not in str(refusal):  # then it is not the trigger's
                raise
            return False
        return True

    if not world.too_short_to_fence(grant):
        world.touch(grant.stream_id)
        world.both(of_product, lambda _: world.model.protected_write(grant))
