"""Runs, effects and flags of items, extractions that read several episodes, and indexes for listings."""

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "r0002"
down_revision = "r0001"
branch_labels = None
depends_on = None

_TURNS: tuple[sa.Column[Any], ...] = (
    sa.Column("episode_id", sa.String(length=128), nullable=False),
    sa.Column("number", sa.Integer(), nullable=False),
    sa.Column("observation", sa.String(length=32), nullable=False),
    sa.Column("action", sa.String(length=32), nullable=False),
    sa.Column("feedback", sa.String(length=32), nullable=False),
    sa.Column("start", sa.Integer(), nullable=False),
    sa.Column("end", sa.Integer(), nullable=False),
    sa.Column("finish_reason", sa.String(length=32), nullable=False),
    sa.Column("reward", sa.Double(), nullable=False),
    sa.Column("seconds", sa.Double(), nullable=False),
)
_TEXTS = ("observation", "action", "feedback")


def upgrade() -> None:
    op.create_table(
        "runs",
        sa.Column("id", sa.String(length=128), nullable=False),
        sa.Column("round_id", sa.String(length=128), nullable=True),
        sa.Column("method", sa.String(length=32), nullable=False),
        sa.Column("model", sa.Text(), nullable=False),
        sa.Column("parent", sa.String(length=128), nullable=True),
        sa.Column("knowledge", sa.String(length=128), nullable=True),
        sa.Column("folder", sa.Text(), nullable=False),
        sa.Column("seed", sa.Text(), nullable=False),
        sa.Column("config", sa.Text(), nullable=False),
        sa.Column("status", sa.String(length=32), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("metrics", sa.Text(), nullable=False),
        sa.Column("created_at", sa.String(32), nullable=False),
        sa.Column("finished_at", sa.String(32), nullable=True),
        sa.ForeignKeyConstraint(["round_id"], ["rounds.id"], name="fk_runs_round_id"),
        sa.PrimaryKeyConstraint("id", name="pk_runs"),
    )
    op.create_index("ix_runs_round_id", "runs", ["round_id"], unique=False)
    op.create_index("ix_runs_knowledge", "runs", ["knowledge"], unique=False)
    op.create_table(
        "extraction_episodes",
        sa.Column("extraction_id", sa.String(length=128), nullable=False),
        sa.Column("position", sa.Integer(), nullable=False),
        sa.Column("episode_id", sa.String(length=128), nullable=False),
        sa.ForeignKeyConstraint(["episode_id"], ["episodes.id"], name="fk_extraction_episodes_episode_id"),
        sa.ForeignKeyConstraint(["extraction_id"], ["extractions.id"], name="fk_extraction_episodes_extraction_id"),
        sa.PrimaryKeyConstraint("extraction_id", "position", name="pk_extraction_episodes"),
    )
    op.create_index("ix_extraction_episodes_episode_id", "extraction_episodes", ["episode_id"], unique=False)
    op.create_table(
        "item_flags",
        sa.Column("item_id", sa.String(length=128), nullable=False),
        sa.Column("flag", sa.String(length=64), nullable=False),
        sa.Column("other", sa.String(length=128), nullable=False),
        sa.Column("note", sa.Text(), nullable=False),
        sa.Column("who", sa.Text(), nullable=False),
        sa.Column("at", sa.String(32), nullable=False),
        sa.ForeignKeyConstraint(["item_id"], ["items.id"], name="fk_item_flags_item_id"),
        sa.PrimaryKeyConstraint("item_id", "flag", "other", name="pk_item_flags"),
    )
    op.create_table(
        "item_effects",
        sa.Column("id", sa.String(length=128), nullable=False),
        sa.Column("item_id", sa.String(length=128), nullable=False),
        sa.Column("round_id", sa.String(length=128), nullable=True),
        sa.Column("method", sa.String(length=32), nullable=False),
        sa.Column("env", sa.String(length=128), nullable=False),
        sa.Column("split", sa.String(length=32), nullable=False),
        sa.Column("checkpoint", sa.String(length=128), nullable=True),
        sa.Column("knowledge", sa.String(length=128), nullable=True),
        sa.Column("effect", sa.Double(), nullable=False),
        sa.Column("low", sa.Double(), nullable=False),
        sa.Column("high", sa.Double(), nullable=False),
        sa.Column("n", sa.Integer(), nullable=False),
        sa.Column("created_at", sa.String(32), nullable=False),
        sa.ForeignKeyConstraint(["item_id"], ["items.id"], name="fk_item_effects_item_id"),
        sa.ForeignKeyConstraint(["round_id"], ["rounds.id"], name="fk_item_effects_round_id"),
        sa.PrimaryKeyConstraint("id", name="pk_item_effects"),
    )
    op.create_index("ix_item_effects_item_id", "item_effects", ["item_id"], unique=False)
    op.create_index("ix_item_effects_round_id", "item_effects", ["round_id"], unique=False)

    op.add_column("events", sa.Column("detail", sa.Text(), nullable=True))
    op.add_column("checkpoints", sa.Column("run_id", sa.String(length=128), nullable=True))
    op.create_index("ix_checkpoints_run_id", "checkpoints", ["run_id"], unique=False)

    op.add_column("episodes", sa.Column("run_id", sa.String(length=128), nullable=True))
    for name in ("started_at", "checkpoint", "round_id_stage", "env_split"):
        op.drop_index(f"ix_episodes_{name}", "episodes")
    op.create_index("ix_episodes_started_at", "episodes", ["started_at", "id"], unique=False)
    op.create_index("ix_episodes_env", "episodes", ["env", "started_at", "id", "split", "success"], unique=False)
    op.create_index("ix_episodes_checkpoint", "episodes", ["checkpoint", "started_at", "id"], unique=False)
    by_round = ["round_id", "started_at", "id", "stage", "success"]
    op.create_index("ix_episodes_round_id", "episodes", by_round, unique=False)
    op.create_index("ix_episodes_run_id", "episodes", ["run_id", "success"], unique=False)
    tally = ["env", "split", "success", "turns", "tokens", "sampled"]
    op.create_index("ix_episodes_tally", "episodes", tally, unique=False)

    op.add_column("items", sa.Column("derived_from", sa.String(length=128), nullable=True))
    op.add_column("items", sa.Column("support", sa.Integer(), server_default="0", nullable=False))
    op.add_column("items", sa.Column("last_seen", sa.String(32), nullable=True))
    for name in ("effect", "effect_low", "effect_high"):
        op.add_column("items", sa.Column(name, sa.Double(), nullable=True))
    op.add_column("items", sa.Column("effect_n", sa.Integer(), nullable=True))
    learned = "FROM item_sources s WHERE s.item_id = items.id AND s.recalled = false"
    op.execute(
        f"UPDATE items SET support = (SELECT count(DISTINCT s.episode_id) {learned}), "  # noqa: S608
        f"last_seen = coalesce((SELECT max(s.created_at) {learned}), created_at)"
    )
    op.drop_index("ix_items_status", "items")
    op.create_index("ix_items_support", "items", ["support", "last_seen", "id"], unique=False)
    op.create_index("ix_items_status", "items", ["status", "support", "last_seen", "id"], unique=False)
    op.create_index("ix_items_effect", "items", ["effect"], unique=False)
    op.create_index("ix_items_derived_from", "items", ["derived_from"], unique=False)

    _remake_turns(sqlite_with_rowid=False)


def downgrade() -> None:
    texts = [sa.ForeignKeyConstraint([name], ["texts.digest"], name=f"fk_turns_{name}") for name in _TEXTS]
    _remake_turns(*texts)
    for name in ("derived_from", "effect", "status", "support"):
        op.drop_index(f"ix_items_{name}", "items")
    op.create_index("ix_items_status", "items", ["status"], unique=False)
    for name in ("derived_from", "support", "last_seen", "effect", "effect_low", "effect_high", "effect_n"):
        op.drop_column("items", name)
    for name in ("tally", "run_id", "round_id", "checkpoint", "env", "started_at"):
        op.drop_index(f"ix_episodes_{name}", "episodes")
    op.drop_column("episodes", "run_id")
    op.create_index("ix_episodes_started_at", "episodes", ["started_at"], unique=False)
    op.create_index("ix_episodes_checkpoint", "episodes", ["checkpoint"], unique=False)
    op.create_index("ix_episodes_round_id_stage", "episodes", ["round_id", "stage"], unique=False)
    op.create_index("ix_episodes_env_split", "episodes", ["env", "split"], unique=False)
    op.drop_index("ix_checkpoints_run_id", "checkpoints")
    op.drop_column("checkpoints", "run_id")
    op.drop_column("events", "detail")
    for table in ("item_effects", "item_flags", "extraction_episodes", "runs"):
        op.drop_table(table)


def _remake_turns(*constraints: sa.ForeignKeyConstraint, **options: bool) -> None:
    """SQLite cannot drop a constraint or change how a table is laid out, so the rows move to a new table."""
    if op.get_bind().dialect.name == "postgresql":
        if constraints:
            for name in _TEXTS:
                op.create_foreign_key(f"fk_turns_{name}", "turns", "texts", [name], ["digest"])
        else:
            for name in _TEXTS:
                op.drop_constraint(f"fk_turns_{name}", "turns", type_="foreignkey")
        return
    op.rename_table("turns", "turns_before")
    op.create_table(
        "turns",
        *(column.copy() for column in _TURNS),
        sa.ForeignKeyConstraint(["episode_id"], ["episodes.id"], name="fk_turns_episode_id"),
        *constraints,
        sa.PrimaryKeyConstraint("episode_id", "number", name="pk_turns"),
        **options,
    )
    names = ", ".join(f'"{column.name}"' for column in _TURNS)
    op.execute(f"INSERT INTO turns ({names}) SELECT {names} FROM turns_before")  # noqa: S608
    op.drop_table("turns_before")
