"""Episodes counted by env and split as they come, in place of an index to count them by."""

import sqlalchemy as sa
from alembic import op

revision = "r0005"
down_revision = "r0004"
branch_labels = None
depends_on = None

_TALLIED = ["env", "split", "success", "turns", "tokens", "sampled"]


def upgrade() -> None:
    op.create_table(
        "tallies",
        sa.Column("env", sa.String(128), nullable=False),
        sa.Column("split", sa.String(32), nullable=False),
        sa.Column("episodes", sa.BigInteger(), nullable=False),
        sa.Column("solved", sa.BigInteger(), nullable=False),
        sa.Column("turns", sa.BigInteger(), nullable=False),
        sa.Column("tokens", sa.BigInteger(), nullable=False),
        sa.Column("sampled", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("env", "split", name="pk_tallies"),
    )
    op.execute(
        "INSERT INTO tallies (env, split, episodes, solved, turns, tokens, sampled) "
        "SELECT env, split, count(*), sum(CASE WHEN success THEN 1 ELSE 0 END), sum(turns), sum(tokens), sum(sampled) "
        "FROM episodes GROUP BY env, split"
    )
    op.drop_index("ix_episodes_tally", "episodes")


def downgrade() -> None:
    op.create_index("ix_episodes_tally", "episodes", _TALLIED, unique=False)
    op.drop_table("tallies")
