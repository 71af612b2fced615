"""The life of a task: transitions, routing, claim, lease, retry, dependencies, order of the line.

`transitions`, `routing`, `backoff` and `line` decide (pure); the other modules apply what they decide inside one
transaction of the store and write the event of it beside it. `life` is the door.
"""
