"""Speaks to a person: `fleet ...`.

`main` is the door: a table of command names, so that `fleet --help` imports no command; `command` holds what
all commands share (`-f`, `-C`, `--json`), `output` prints, `client` speaks to a running control plane. Every
other module is one command, imported when it is called.
"""
