"""A program for machines under test: what a daemon shows its machine, and nothing else.

`tiny_daemon.py NAME`: writes run/NAME.json as the current generation says, again at SIGHUP, ends at SIGTERM. The
generation's orchestrators/NAME/behaviour makes it `crash` at once, stay `silent` (no status), be `stubborn`
(ignores SIGTERM), or, read anew at SIGHUP, `die` then.
"""

import json
import os
import pathlib
import signal
import sys

root, name = pathlib.Path(os.environ["FLEET_ROOT"]), sys.argv[1]


def behaviour() -> str:
    return (root / f"current/orchestrators/{name}/behaviour").read_text()


def say() -> None:
    status = {
        "pid": os.getpid(),
        "generation": (root / "current").readlink().name,
        "charter_version": "c1",
        "link": "connecting",
        "sessions": 0,
    }
    aside = root / f"run/{name}.json.part"
    aside.write_text(json.dumps(status))
    aside.rename(root / f"run/{name}.json")


def reread(*_: object) -> None:
    if behaviour() == "die":
        os._exit(3)
    say()


signal.signal(signal.SIGHUP, reread)
if behaviour() == "stubborn":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if behaviour() == "crash":
    sys.exit(3)
if behaviour() != "silent":
    say()
while True:
    signal.pause()
