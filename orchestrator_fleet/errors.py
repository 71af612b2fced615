"""Every error a user can meet, as one tree.

FleetError                        something a person should read; exit code 1
├── UsageError                    the command line is wrong; exit 64
├── SpecInvalid                   fleet.yaml or a charter is wrong; carries every Diagnostic at once
├── Refused                       we could, but must not; exit 3
│   ├── StalePlan                 a machine or the spec moved since the plan was made
│   ├── Protected                 the plan would delete something marked `protect: true`
│   └── LeaseHeld                 another apply holds the machine
├── MachineError                  one machine failed; the others go on
│   └── Unreachable               it could not be asked at all
├── ApplyFailed                   some machines did not become healthy in time
├── RolledBack                    the machines were put back to their last good generation; exit 4
├── ControlPlaneError             the control plane answered with an error, or not at all
├── StoreError                    the live database cannot be used; says the cure
│   ├── StoreFull                 there is no room to write; what was answered stands
│   └── StoreDamaged              what it holds can't be trusted; a backup has to be put back
└── TaskError                     a task's rule says no; `code` is the API's word for it
    ├── NotFound                  no such task, orchestrator, ...
    ├── InvalidTransition         the status table has no such edge
    ├── LeaseLost                 the token is not the current attempt's
    ├── Forbidden                 the key has the scope, but this is not for its owner to do
    ├── Conflict                  any other 409
    └── Invalid                   the request's fields are wrong (422), all of them at once
"""

from __future__ import annotations

from dataclasses import dataclass

EXIT_DONE, EXIT_FAILED, EXIT_CHANGES, EXIT_REFUSED, EXIT_ROLLED_BACK, EXIT_USAGE = 0, 1, 2, 3, 4, 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnostic:
    """One thing wrong with the spec, where it stands and what to do about it.

    `line` and `column` count from 1; 0 means the file as a whole. `path` is the place in the document,
    as `orchestrators.vp-eng.charter`.
    """

    file: str
    line: int = 0
    column: int = 0
    path: str = ""
    problem: str
    hint: str = ""

    def __str__(self) -> str:
        where = f"{self.file}:{self.line}:{self.column}" if self.line else self.file
        path = f" {self.path}:" if self.path else ""
        hint = f"; {self.hint}" if self.hint else ""
        return f"{where}:{path} {self.problem}{hint}"


class FleetError(Exception):
    """Something went wrong that a person should read about; the text says what to do."""

    exit_code = EXIT_FAILED


class UsageError(FleetError):
    """The command line is wrong."""

    exit_code = EXIT_USAGE


class SpecInvalid(FleetError):
    """The spec is wrong; every diagnostic of the run at once, in file order."""

    def __init__(self, diagnostics: list[Diagnostic]) -> None:
        self.diagnostics = sorted(diagnostics, key=lambda d: (d.file, d.line, d.column, d.path))
        super().__init__("\n".join(str(d) for d in self.diagnostics))


class Refused(FleetError):
    """It could be done, but must not be."""

    exit_code = EXIT_REFUSED


class StalePlan(Refused):
    """The plan was made against a state that is no longer so; make a new plan."""


class Protected(Refused):
    """The plan deletes something protected; lift `protect` in an earlier apply."""


class LeaseHeld(Refused):
    """Another apply holds the lease; wait for it, or for its expiry."""


class MachineError(FleetError):
    """One machine failed."""

    def __init__(self, machine: str, problem: str) -> None:
        self.machine = machine
        super().__init__(f"{machine}: {problem}")


class Unreachable(MachineError):
    """The machine could not be asked at all."""


class ApplyFailed(FleetError):
    """Some machines did not become what the plan says."""


class RolledBack(FleetError):
    """Machines were put back to their last good generation."""

    exit_code = EXIT_ROLLED_BACK


class ControlPlaneError(FleetError):
    """The control plane answered with an error, or not at all."""

    def __init__(self, message: str, *, status: int = 0, code: str = "") -> None:
        self.status, self.code = status, code
        super().__init__(message)


class StoreError(FleetError):
    """The live database cannot be used."""


class StoreFull(StoreError):
    """There is no room to write; make some. What was answered stands, and reading goes on."""

    code = "store_full"


class StoreDamaged(StoreError):
    """The database is not what was written; put back a backup."""

    code = "store_damaged"


class TaskError(FleetError):
    """A task's rule says no."""

    code = "conflict"


class NotFound(TaskError):
    """There is no such thing."""

    code = "not_found"


class InvalidTransition(TaskError):
    """The status table has no such edge; the text names the legal ones."""

    code = "invalid_transition"


class LeaseLost(TaskError):
    """The token is not the current attempt's: stop, and drop what you have."""

    code = "lease_lost"


class Forbidden(TaskError):
    """The key has the scope, but this is not for its owner to do."""

    code = "forbidden"


class Conflict(TaskError):
    """The request is understood and contradicts the state; `code` says how."""

    def __init__(self, code: str, message: str) -> None:
        self.code = code
        super().__init__(message)


class Invalid(TaskError):
    """Fields of the request are wrong: (field, message) pairs, all at once."""

    code = "invalid"

    def __init__(self, errors: list[tuple[str, str]]) -> None:
        self.errors = errors
        super().__init__("; ".join(f"{field}: {message}" for field, message in errors))
