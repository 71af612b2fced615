"""Eyes and hands: what reads a machine and what changes it. `transport.Transport` is the one way to either.

`hands` runs on the machine itself; `local` and `fake` carry requests to one.
"""
