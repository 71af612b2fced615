"""supervisord's files, and the digest of all that must restart a daemon.

Nothing here names a folder: who starts supervisord sets FLEET_ROOT, FLEET_SOCKET and FLEET_PYTHON, and supervisord
puts them in. So a generation has the same bytes on every machine.
"""

from __future__ import annotations

from orchestrator_fleet import __version__
from orchestrator_fleet.wire.documents import RunnerDoc, encode, sha256

DIGEST_CHARACTERS = 16
LOG_MAX_BYTES = "5MB"
LOG_BACKUPS = 2
STOP_WAIT_S = 10

SUPERVISORD = f"""\
; Written by orchestrator_fleet; the next apply writes it anew.
[unix_http_server]
file=%(ENV_FLEET_SOCKET)s
chmod=0600

[supervisord]
directory=%(ENV_FLEET_ROOT)s
pidfile=%(ENV_FLEET_ROOT)s/run/supervisord.pid
logfile=%(ENV_FLEET_ROOT)s/log/supervisord.log
logfile_maxbytes={LOG_MAX_BYTES}
logfile_backups={LOG_BACKUPS}
childlogdir=%(ENV_FLEET_ROOT)s/log

[rpcinterface:supervisor]
supervisor.rpcinterface_factory=supervisor.rpcinterface:make_main_rpcinterface

[include]
files=programs/*.conf
"""

# startsecs=0: a daemon says itself when it is ready. stopasgroup, killasgroup: sessions outlive their daemon.
_PROGRAM = f"""\
; orchestrator_fleet {{version}}
[program:{{name}}]
command="%(ENV_FLEET_PYTHON)s" -m orchestrator_fleet.daemon {{name}}
directory=%(ENV_FLEET_ROOT)s
environment=FLEET_PROGRAM="{{digest}}"
autostart=true
autorestart=true
startsecs=0
stopsignal=TERM
stopwaitsecs={STOP_WAIT_S}
stopasgroup=false
killasgroup=false
redirect_stderr=true
stdout_logfile=%(ENV_FLEET_ROOT)s/log/{{name}}.log
stdout_logfile_maxbytes={LOG_MAX_BYTES}
stdout_logfile_backups={LOG_BACKUPS}
"""


def digest(*, name: str, runner: RunnerDoc) -> str:
    """16 hex digits over the runtime's version, the runner and the program's own lines."""
    return sha256(encode([__version__, name, runner, _PROGRAM]))[:DIGEST_CHARACTERS]


def conf(*, name: str, program: str) -> str:
    """`programs/<name>.conf`; `program` is its digest, which the running process shows in its environment."""
    return _PROGRAM.format(version=_literal(__version__), name=_literal(name), digest=_literal(program))


def _literal(text: str) -> str:
    """`100%` -> `100%%`: supervisord expands percent signs in all that it reads."""
    return text.replace("%", "%%")
