"""Alembic's entry: runs on the connection, and in the transaction, that `store.migrate` hands over."""

from __future__ import annotations

from alembic import context

from orchestrator_fleet.store.schema import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata, transactional_ddl=False)
context.run_migrations()
