"""A declarative, config-driven fleet manager for AI agents.

Two flows, each one way: `fleet.yaml -> spec -> render -> plan -> machines` makes the machines match
what people wrote; `api -> store -> tasks -> daemon -> history` gets tasks done and remembers how.
"""

__version__ = "0.1.0"
