"""`fleet task add` of a task that nobody gets."""

from __future__ import annotations

import http.server
import json
import threading

from command_line import Run

SAID = "nobody gets it: no routing rule matches it; assign it, or add a routing rule"


class _Api(http.server.BaseHTTPRequestHandler):
    """A control plane whose rules match nothing."""

    def do_POST(self) -> None:
        task = {"id": "task-1", "status": "TODO", "orchestrator": None, "route": None, "condition": SAID}
        body = json.dumps(task).encode()
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(201)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Silent."""


def test_it_says_why_and_what_to_do(run: Run) -> None:
    """In the control plane's own words."""
    server = http.server.HTTPServer(("127.0.0.1", 0), _Api)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        done = run("task", "add", "--title", "x", "--url", f"http://127.0.0.1:{server.server_port}", FLEET_KEY="k")
    finally:
        server.shutdown()
        server.server_close()
    assert done.stdout == f"task-1  TODO  {SAID}\n"
