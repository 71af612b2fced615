"""The HTTP and WebSocket door of the control plane: thin handlers over `tasks` and `orchestrators`.

serve      the process: lock, socket, store, loops, signals
app door   the application; who is asking, and a log line for each request
*_routes   handlers        bodies asking problems   what a request is, and every error as problem+json
link       the daemons' WebSocket                   work waiters pulse   handing out work, waking who waits
plane      the running control plane as a value     control   what is applied     loops   what goes on beside
declaring wanted authorship   an edit of the fleet's files as a commit: tried, written, and by whom
pending    what was so committed, and no apply has brought yet
reconciler applying keep_applied   plan and apply from here: in turn, for who asks, and by itself
acting restarting errands          actions: in their transaction, and what takes longer than a request
issuing key_watch uses             keys: made and brought into force, revoked elsewhere, last used
settle unsettled delivery          what becomes of what was passed on; notices on their way to a daemon
"""
