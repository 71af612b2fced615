"""A worker that speaks HTTP: claims, works a little, reports; and writes each step to a ledger before it goes on.

    python -I -S poller.py LEDGER ORCHESTRATOR SEED URL [URL ...]          the key in FLEET_KEY

Only the standard library: it is started and killed by the dozen. The ledger is the witness that the control plane
can't influence: one line a step, appended in one write and synced.
"""

from __future__ import annotations

import http.client
import json
import os
import random
import sys
import time
from typing import Any
from urllib.parse import urlsplit

LEASE_S = 5
WAIT_S = 2
TIMEOUT_S = 15.0
AGAIN_S = 0.1


class Poller:
    """One connection at a time, to the first control plane that answers."""

    def __init__(self, ledger: str, orchestrator: str, seed: int, urls: list[str]) -> None:
        self.orchestrator, self.urls = orchestrator, urls
        self.dice = random.Random(seed)  # noqa: S311 - a test's dice
        self.ledger = os.open(ledger, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self.connection: http.client.HTTPConnection | None = None
        self.headers = {"Authorization": f"Bearer {os.environ['FLEET_KEY']}", "Content-Type": "application/json"}

    def write(self, step: str, task: str, attempt: int, **more: Any) -> None:
        """One line, on the disk when this returns."""
        line = {"at": time.monotonic(), "pid": os.getpid(), "step": step, "task": task, "attempt": attempt, **more}
        os.write(self.ledger, json.dumps(line).encode() + b"\n")
        os.fsync(self.ledger)

    def ask(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        """Ask once; raises OSError or HTTPException when nobody answers."""
        if self.connection is None:
            url = urlsplit(self.dice.choice(self.urls))
            self.connection = http.client.HTTPConnection(url.hostname or "", url.port, timeout=TIMEOUT_S)
        try:
            self.connection.request("POST", path, json.dumps(body), self.headers)
            answer = self.connection.getresponse()
            return answer.status, json.loads(answer.read() or b"null")
        except BaseException:
            self.connection.close()
            self.connection = None
            raise

    def insist(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        """Ask until somebody answers, and not with a 5xx."""
        while True:
            try:
                status, answer = self.ask(path, body)
            except (OSError, http.client.HTTPException, ValueError):
                time.sleep(AGAIN_S)
                continue
            if status < 500:
                return status, answer
            time.sleep(AGAIN_S)

    def run(self) -> None:
        """Claim and work for ever."""
        while True:
            asked = {
                "orchestrator": self.orchestrator,
                "wait": WAIT_S,
                "limit": self.dice.choice((1, 1, 2)),
                "lease_s": LEASE_S,
            }
            status, answer = self.insist("/api/tasks/poll", asked)
            if status != 200:
                raise SystemExit(f"poll: {status} {answer}")
            grants = [(one["task"]["id"], one["lease"]["attempt"], one["lease"]["token"]) for one in answer["data"]]
            for task, attempt, token in grants:
                self.write("claimed", task, attempt, token=token)
            for task, attempt, token in grants:
                self.work(task, attempt, token)

    def work(self, task: str, attempt: int, token: str) -> None:
        """One attempt, ended in one of the ways there are."""
        time.sleep(self.dice.choice((0.0, 0.01, 0.1, 0.5, 1.0)))
        if self.dice.random() < 0.2:
            self.insist(f"/api/tasks/{task}/heartbeat", {"token": token, "lease_s": LEASE_S})
        end = self.dice.choices(("complete", "fail", "release"), (16, 2, 1))[0]
        body: dict[str, Any] = {"token": token}
        if end == "complete":
            body["result"] = {"attempt": attempt, "pid": os.getpid()}
        elif end == "fail":
            body["error"] = {"message": "the dice said so"}
        self.write(f"{end}?", task, attempt)
        status, answer = self.insist(f"/api/tasks/{task}/{end}", body)
        self.write(f"{end}!" if status == 200 else "refused", task, attempt, status=status)
        if status not in (200, 409):
            raise SystemExit(f"{end} {task}: {status} {answer}")


if __name__ == "__main__":
    Poller(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4:]).run()
