"""Alembic's entry: runs the revisions on the connection that `memory.database` hands over, in its transaction."""

from alembic import context

from memory.schema import Base

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=Base.metadata,
    version_table="engrain_version",
)
with context.begin_transaction():
    context.run_migrations()
