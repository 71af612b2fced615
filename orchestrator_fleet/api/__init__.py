"""The HTTP and WebSocket door of the control plane: thin handlers over `tasks` and `orchestrators`.

serve      the process: lock, socket, store, loops, signals
app door   the application; who is asking, and a log line for each request
*_routes   handlers        bodies asking problems   what a request is, and every error as problem+json
link       the daemons' WebSocket                   work waiters pulse   handing out work, waking who waits
plane      the running control plane as a value     control   what is applied     loops   what goes on beside
declaring wanted authorship   an edit of the fleet's files as a commit: tried, written, and by whom
reconciler applying keep_applied   plan and apply from here: in turn, for who asks, and by itself
"""
