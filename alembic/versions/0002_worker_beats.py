"""When a worker was last heard of, and which process it is: `lease_workers.beaten_at`, `incarnation`.

Its row's `expires_at` does not tell when, since each worker has a TTL of its own. A heartbeat writes both; no index is
on either. Host and pid do not tell which: in a container every process has the same.
"""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql

from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    on_postgresql = op.get_bind().dialect.name == "postgresql"
    instant = postgresql.TIMESTAMP(timezone=True) if on_postgresql else sa.Text()
    op.add_column("lease_workers", sa.Column("beaten_at", instant))
    op.add_column("lease_workers", sa.Column("incarnation", sa.Uuid() if on_postgresql else sa.Text()))


def downgrade() -> None:
    op.drop_column("lease_workers", "incarnation")
    op.drop_column("lease_workers", "beaten_at")
