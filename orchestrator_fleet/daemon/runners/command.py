"""The `command` runner: a session is any command.

argv in the session's own folder (or the workspace named in the task), the task as JSON on stdin, and an
environment of PATH, HOME, LANG, TZ, the declared secrets and five names of ours. Nothing else is inherited.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from orchestrator_fleet.daemon.folder import SessionFolder
from orchestrator_fleet.daemon.generation import Generation
from orchestrator_fleet.daemon.workspace import Workspace

INHERITED = ("PATH", "HOME", "LANG", "TZ")
ASSETS = "{assets}"
_KIB = 1024

# Positional parameters: memory limit in KiB or '', what to clone or '', its ref, '--shared' or '', then the argv.
# - It ignores the ladder's TERM, so as to live to write the exit code of the command that didn't.
# - `ln` refuses an existing name: a session that a restarted daemon has given up (it made `pid`) never runs.
# - env takes out what some shells put into the environment by themselves.
# - At its end it takes along whatever is left of its process group.
SCRIPT = r"""
trap : HUP INT TERM
IFS= read -r stat < "/proc/$$/stat" && printf '%s\n' "$stat" > .pid.part && ln .pid.part pid || exit 1
leave() {
  printf '%s' "$1" > .exit.part && mv .exit.part exit
  kill -KILL 0
}
memory=$1 source=$2 ref=$3 shared=$4
shift 4
if [ -n "$source" ]; then
  : > cloning
  (
    export GIT_TERMINAL_PROMPT=0
    git clone --quiet $shared --no-checkout -- "$source" repo || exit
    cd repo || exit
    commit=$(git rev-parse --verify --quiet "refs/remotes/origin/$ref^{commit}") ||
      commit=$(git rev-parse --verify "$ref^{commit}") || exit
    git checkout --quiet --detach "$commit"
  ) < /dev/null || leave "$?"
  rm cloning
fi
(
  if [ -n "$memory" ]; then ulimit -v "$memory" || exit; fi
  exec /usr/bin/env -u PWD -u OLDPWD -u SHLVL -u _ -- "$@"
)
leave "$?"
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """What to start: a whole argv and a whole environment."""

    argv: tuple[str, ...]
    environment: Mapping[str, str]


def launch(
    *,
    generation: Generation,
    folder: SessionFolder,
    task: str,
    attempt: int,
    workspace: Workspace | None,
    secrets: Mapping[str, str],
    inbox: Path,
    environ: Mapping[str, str],
) -> Launch:
    """The session of one attempt. `environ` is the daemon's own environment."""
    doc = generation.doc
    memory = str(max(1, doc.session_memory_bytes // _KIB)) if doc.session_memory_bytes else ""
    clone = ("", "", "")
    if workspace is not None and workspace.source is not None:
        clone = (workspace.source, workspace.ref, "--shared" if workspace.local else "")
    assets = str(folder.assets)
    command = (element.replace(ASSETS, assets) for element in doc.runner.command)
    return Launch(
        argv=("/bin/sh", "-c", SCRIPT, "fleet-session", memory, *clone, *command),
        environment={
            **{name: environ[name] for name in INHERITED if name in environ},
            **secrets,
            "FLEET_TASK_ID": task,
            "FLEET_ATTEMPT": str(attempt),
            "FLEET_RESULT": str(folder.result),
            "FLEET_URL": doc.control_url,
            "FLEET_INBOX": str(inbox),
        },
    )
