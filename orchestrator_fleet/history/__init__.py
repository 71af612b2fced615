"""What happened: the outbox, moved into DuckDB exactly once, and the door to ask it in SQL.

    store's outbox ─▶ ingest (rows and cursor in one transaction) ─▶ events ─▶ views ─▶ sql (read-only)

Who calls: `fleet serve` (an ingester of its own, queried through `door`), and `fleet sql` when nothing serves.
`schema.sql` says what an analyst finds there.
"""
