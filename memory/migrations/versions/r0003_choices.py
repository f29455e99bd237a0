"""What a restricted reply could have been, so that whoever trains on it can make its mask again."""

import sqlalchemy as sa
from alembic import op

revision = "r0003"
down_revision = "r0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("turns", sa.Column("choices", sa.Text(), nullable=True))


def downgrade() -> None:
    op.drop_column("turns", "choices")
