"""After a fork the child has nothing of its parent's: not a lease, not a connection. The parent notices nothing.

What must know of a fork says so with `tell`. In the child its `orphan` is called before anything else runs. That must
take no lock: a thread of the parent's may have held it, and there is no such thread in the child.
"""

from __future__ import annotations

import os
from typing import Protocol
from weakref import WeakSet


class Orphan(Protocol):
    def orphan(self) -> None: ...


_told: WeakSet[Orphan] = WeakSet()


def tell(orphan: Orphan) -> None:
    """Call `orphan.orphan()` in every child that is forked while it is alive."""
    _told.add(orphan)


def _in_child() -> None:
    for orphan in list(_told):
        orphan.orphan()


os.register_at_fork(after_in_child=_in_child)
