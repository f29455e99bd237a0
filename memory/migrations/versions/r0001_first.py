"""First revision: the whole lineage from task to evaluation."""

import sqlalchemy as sa
from alembic import op

revision = "r0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "events",
        sa.Column("id", sa.Integer(), autoincrement=True, nullable=False),
        sa.Column("at", sa.String(32), nullable=False),
        sa.Column("who", sa.Text(), nullable=False),
        sa.Column("kind", sa.String(length=32), nullable=False),
        sa.Column("subject", sa.String(length=128), nullable=False),
        sa.Column("action", sa.String(length=64), nullable=False),
        sa.Column("why", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_events"),
    )
    op.create_index("ix_events_subject", "events", ["subject"], unique=False)
    op.create_table(
        "rounds",
        sa.Column("id", sa.String(length=128), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("model", sa.Text(), nullable=False),
        sa.Column("seed", sa.Text(), nullable=False),
        sa.Column("config", sa.Text(), nullable=False),
        sa.Column("stage", sa.Text(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("status", sa.String(length=32), nullable=False),
        sa.Column("verdict", sa.Text(), nullable=True),
        sa.Column("created_at", sa.String(32), nullable=False),
        sa.Column("updated_at", sa.String(32), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_rounds"),
        sa.UniqueConstraint("number", name="uq_rounds_number"),
    )
    op.create_index("ix_rounds_status", "rounds", ["status"], unique=False)
    op.create_table(
        "tasks",
        sa.Column("id", sa.String(length=128), nullable=False),
        sa.Column("env", sa.String(length=128), nullable=False),
        sa.Column("seed", sa.Text(), nullable=False),
        sa.Column("parameters", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_tasks"),
    )
    op.create_index("ix_tasks_env", "tasks", ["env"], unique=False)
    op.create_table(
        "texts",
        sa.Column("digest", sa.String(length=32), nullable=False),
        sa.Column("body", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("digest", name="pk_texts"),
    )
    op.create_table(
        "checkpoints",
        sa.Column("id", sa.String(length=128), nullable=False),
        sa.Column("model", sa.Text(), nullable=False),
        sa.Column("path", sa.Text(), nullable=False),
        sa.Column("kind", sa.String(length=32), nullable=False),
        sa.Column("parent", sa.String(length=128), nullable=True),
        sa.Column("knowledge", sa.String(length=128), nullable=True),
        sa.Column("round_id", sa.String(length=128), nullable=True),
        sa.Column("status", sa.String(length=32), nullable=False),
        sa.Column("manifest", sa.Text(), nullable=False),
        sa.Column("created_at", sa.String(32), nullable=False),
        sa.Column("promoted_at", sa.String(32), nullable=True),
        sa.ForeignKeyConstraint(["round_id"], ["rounds.id"], name="fk_checkpoints_round_id"),
        sa.PrimaryKeyConstraint("id", name="pk_checkpoints"),
    )
    op.create_index("ix_checkpoints_knowledge", "checkpoints", ["knowledge"], unique=False)
    op.create_index("ix_checkpoints_round_id", "checkpoints", ["round_id"], unique=False)
    op.create_index("ix_checkpoints_status", "checkpoints", ["status"], unique=False)
    op.create_table(
        "episodes",
        sa.Column("id", sa.String(length=128), nullable=False),
        sa.Column("task_id", sa.String(length=128), nullable=False),
        sa.Column("env", sa.String(length=128), nullable=False),
        sa.Column("split", sa.String(length=32), nullable=False),
        sa.Column("round_id", sa.String(length=128), nullable=True),
        sa.Column("stage", sa.String(length=64), nullable=False),
        sa.Column("model", sa.Text(), nullable=False),
        sa.Column("checkpoint", sa.String(length=128), nullable=True),
        sa.Column("knowledge", sa.String(length=128), nullable=True),
        sa.Column("success", sa.Boolean(), nullable=False),
        sa.Column("score", sa.Double(), nullable=False),
        sa.Column("reward", sa.Double(), nullable=False),
        sa.Column("stop_reason", sa.String(length=32), nullable=False),
        sa.Column("error", sa.Text(), nullable=True),
        sa.Column("human", sa.Boolean(), nullable=False),
        sa.Column("turns", sa.Integer(), nullable=False),
        sa.Column("tokens", sa.Integer(), nullable=False),
        sa.Column("sampled", sa.Integer(), nullable=False),
        sa.Column("prompt_length", sa.Integer(), nullable=False),
        sa.Column("started_at", sa.String(32), nullable=False),
        sa.Column("seconds", sa.Double(), nullable=False),
        sa.Column("added_at", sa.String(32), nullable=False),
        sa.Column("sampling", sa.Text(), nullable=False),
        sa.Column("messages", sa.Text(), nullable=False),
        sa.Column("feedback", sa.Text(), nullable=False),
        sa.Column("token_ids", sa.LargeBinary(), nullable=False),
        sa.Column("loss_mask", sa.LargeBinary(), nullable=False),
        sa.Column("logprobs", sa.LargeBinary(), nullable=False),
        sa.ForeignKeyConstraint(["round_id"], ["rounds.id"], name="fk_episodes_round_id"),
        sa.ForeignKeyConstraint(["task_id"], ["tasks.id"], name="fk_episodes_task_id"),
        sa.PrimaryKeyConstraint("id", name="pk_episodes"),
    )
    op.create_index("ix_episodes_checkpoint", "episodes", ["checkpoint"], unique=False)
    op.create_index("ix_episodes_env_split", "episodes", ["env", "split"], unique=False)
    op.create_index("ix_episodes_knowledge", "episodes", ["knowledge"], unique=False)
    op.create_index("ix_episodes_round_id_stage", "episodes", ["round_id", "stage"], unique=False)
    op.create_index("ix_episodes_started_at", "episodes", ["started_at"], unique=False)
    op.create_index("ix_episodes_task_id", "episodes", ["task_id"], unique=False)
    op.create_table(
        "evaluations",
        sa.Column("id", sa.String(length=128), nullable=False),
        sa.Column("name", sa.String(length=128), nullable=False),
        sa.Column("round_id", sa.String(length=128), nullable=True),
        sa.Column("checkpoint", sa.String(length=128), nullable=True),
        sa.Column("knowledge", sa.String(length=128), nullable=True),
        sa.Column("env", sa.String(length=128), nullable=False),
        sa.Column("split", sa.String(length=32), nullable=False),
        sa.Column("n", sa.Integer(), nullable=False),
        sa.Column("successes", sa.Integer(), nullable=False),
        sa.Column("accuracy", sa.Double(), nullable=False),
        sa.Column("low", sa.Double(), nullable=False),
        sa.Column("high", sa.Double(), nullable=False),
        sa.Column("mean_score", sa.Double(), nullable=False),
        sa.Column("created_at", sa.String(32), nullable=False),
        sa.ForeignKeyConstraint(["round_id"], ["rounds.id"], name="fk_evaluations_round_id"),
        sa.PrimaryKeyConstraint("id", name="pk_evaluations"),
    )
    op.create_index("ix_evaluations_checkpoint", "evaluations", ["checkpoint"], unique=False)
    op.create_index("ix_evaluations_round_id", "evaluations", ["round_id"], unique=False)
    op.create_table(
        "items",
        sa.Column("id", sa.String(length=128), nullable=False),
        sa.Column("text", sa.Text(), nullable=False),
        sa.Column("status", sa.String(length=32), nullable=False),
        sa.Column("round_id", sa.String(length=128), nullable=True),
        sa.Column("created_at", sa.String(32), nullable=False),
        sa.ForeignKeyConstraint(["round_id"], ["rounds.id"], name="fk_items_round_id"),
        sa.PrimaryKeyConstraint("id", name="pk_items"),
    )
    op.create_index("ix_items_status", "items", ["status"], unique=False)
    op.create_table(
        "knowledge",
        sa.Column("id", sa.String(length=128), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("text", sa.Text(), nullable=False),
        sa.Column("tokens", sa.Integer(), nullable=False),
        sa.Column("dropped", sa.Text(), nullable=False),
        sa.Column("round_id", sa.String(length=128), nullable=True),
        sa.Column("parent", sa.String(length=128), nullable=True),
        sa.Column("created_at", sa.String(32), nullable=False),
        sa.ForeignKeyConstraint(["parent"], ["knowledge.id"], name="fk_knowledge_parent"),
        sa.ForeignKeyConstraint(["round_id"], ["rounds.id"], name="fk_knowledge_round_id"),
        sa.PrimaryKeyConstraint("id", name="pk_knowledge"),
        sa.UniqueConstraint("version", name="uq_knowledge_version"),
    )
    op.create_index("ix_knowledge_round_id", "knowledge", ["round_id"], unique=False)
    op.create_table(
        "evaluation_results",
        sa.Column("evaluation_id", sa.String(length=128), nullable=False),
        sa.Column("position", sa.Integer(), nullable=False),
        sa.Column("task_id", sa.String(length=128), nullable=False),
        sa.Column("episode_id", sa.String(length=128), nullable=True),
        sa.Column("success", sa.Boolean(), nullable=False),
        sa.Column("score", sa.Double(), nullable=False),
        sa.ForeignKeyConstraint(["evaluation_id"], ["evaluations.id"], name="fk_evaluation_results_evaluation_id"),
        sa.PrimaryKeyConstraint("evaluation_id", "position", name="pk_evaluation_results"),
    )
    op.create_table(
        "extractions",
        sa.Column("id", sa.String(length=128), nullable=False),
        sa.Column("episode_id", sa.String(length=128), nullable=False),
        sa.Column("round_id", sa.String(length=128), nullable=True),
        sa.Column("model", sa.Text(), nullable=False),
        sa.Column("checkpoint", sa.String(length=128), nullable=True),
        sa.Column("mode", sa.String(length=32), nullable=False),
        sa.Column("prompt_version", sa.String(length=32), nullable=False),
        sa.Column("seed", sa.Text(), nullable=False),
        sa.Column("output", sa.Text(), nullable=False),
        sa.Column("items", sa.Text(), nullable=False),
        sa.Column("malformed", sa.Text(), nullable=False),
        sa.Column("created_at", sa.String(32), nullable=False),
        sa.ForeignKeyConstraint(["episode_id"], ["episodes.id"], name="fk_extractions_episode_id"),
        sa.ForeignKeyConstraint(["round_id"], ["rounds.id"], name="fk_extractions_round_id"),
        sa.PrimaryKeyConstraint("id", name="pk_extractions"),
    )
    op.create_index("ix_extractions_episode_id", "extractions", ["episode_id"], unique=False)
    op.create_index("ix_extractions_round_id", "extractions", ["round_id"], unique=False)
    op.create_table(
        "knowledge_items",
        sa.Column("knowledge_id", sa.String(length=128), nullable=False),
        sa.Column("position", sa.Integer(), nullable=False),
        sa.Column("item_id", sa.String(length=128), nullable=False),
        sa.Column("text", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(["item_id"], ["items.id"], name="fk_knowledge_items_item_id"),
        sa.ForeignKeyConstraint(["knowledge_id"], ["knowledge.id"], name="fk_knowledge_items_knowledge_id"),
        sa.PrimaryKeyConstraint("knowledge_id", "position", name="pk_knowledge_items"),
    )
    op.create_index("ix_knowledge_items_item_id", "knowledge_items", ["item_id"], unique=False)
    op.create_table(
        "turns",
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
        sa.ForeignKeyConstraint(["action"], ["texts.digest"], name="fk_turns_action"),
        sa.ForeignKeyConstraint(["episode_id"], ["episodes.id"], name="fk_turns_episode_id"),
        sa.ForeignKeyConstraint(["feedback"], ["texts.digest"], name="fk_turns_feedback"),
        sa.ForeignKeyConstraint(["observation"], ["texts.digest"], name="fk_turns_observation"),
        sa.PrimaryKeyConstraint("episode_id", "number", name="pk_turns"),
    )
    op.create_table(
        "item_sources",
        sa.Column("id", sa.String(length=128), nullable=False),
        sa.Column("item_id", sa.String(length=128), nullable=False),
        sa.Column("episode_id", sa.String(length=128), nullable=True),
        sa.Column("extraction_id", sa.String(length=128), nullable=True),
        sa.Column("text", sa.Text(), nullable=False),
        sa.Column("recalled", sa.Boolean(), nullable=False),
        sa.Column("created_at", sa.String(32), nullable=False),
        sa.ForeignKeyConstraint(["episode_id"], ["episodes.id"], name="fk_item_sources_episode_id"),
        sa.ForeignKeyConstraint(["extraction_id"], ["extractions.id"], name="fk_item_sources_extraction_id"),
        sa.ForeignKeyConstraint(["item_id"], ["items.id"], name="fk_item_sources_item_id"),
        sa.PrimaryKeyConstraint("id", name="pk_item_sources"),
    )
    op.create_index("ix_item_sources_episode_id", "item_sources", ["episode_id"], unique=False)
    op.create_index("ix_item_sources_extraction_id", "item_sources", ["extraction_id"], unique=False)
    op.create_index("ix_item_sources_item_id", "item_sources", ["item_id"], unique=False)


def downgrade() -> None:
    for table in (
        "item_sources",
        "turns",
        "knowledge_items",
        "extractions",
        "evaluation_results",
        "knowledge",
        "items",
        "evaluations",
        "episodes",
        "checkpoints",
        "texts",
        "tasks",
        "rounds",
        "events",
    ):
        op.drop_table(table)
