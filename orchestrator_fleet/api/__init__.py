"""The HTTP and WebSocket door of the control plane: thin handlers over `tasks` and `orchestrators`.

serve      the process: lock, socket, store, loops, signals
app door   the application; who is asking, and a log line for each request
*_routes   handlers        bodies asking problems   what a request is, and every error as problem+json
link       the daemons' WebSocket                   work waiters pulse   handing out work, waking who waits
plane      the running control plane as a value     control   what is applied     loops   what goes on beside
"""
