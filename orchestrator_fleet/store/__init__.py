"""The live database: schema, migrations, one write door with group commit, the outbox.

Who calls: `tasks`, `orchestrators`, `history` and the API. Nothing here knows what a task means; it knows
which rows may stand.
"""
