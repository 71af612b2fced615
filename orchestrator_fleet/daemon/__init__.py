"""The process on a machine: one per orchestrator, under supervisord.

It holds a link to the control plane, claims tasks while it has free slots, works each in a session (a process of
its own that outlives the daemon), and tells how it ended. A restarted daemon adopts the sessions it finds.

    generation ─▶ engine ─▶ link (claim) ─▶ runners ─▶ sessions ─▶ outcome ─▶ link (finish)
                    ▲                                     │
                    └── adoption (after a restart) ◀── folder (what is on disk)
"""
