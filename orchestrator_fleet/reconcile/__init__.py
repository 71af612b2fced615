"""The fleet loop: look at every machine, compare with what ought to be, act, and look again.

    state      where a fleet's run-time files stand
    applied    what the control plane's generations tell of earlier applies
    observe    look at all machines at once
    look       spec, observed and desired: what every pass starts from
    leases     holding the machines while they are changed
    health     when a machine counts as healthy (pure)
    rollout    batches, and one machine: switch, wait for health, confirm, or go back
    staging    bringing a bundle to a target, only what it lacks
    apply      all of one apply, in its order
    destroy    taking everything down
    interrupts Ctrl-C: once finishes the machine in hand
    conditions what is said of a machine and its programs (pure)
    control    publishing what the control plane works by
    report     what came of it
    declare    the other way in: an edit of the fleet's files, as a commit or a branch
    repository the git repository those files are kept in
    fleet      the doors: plan, apply, status, destroy

The CLI and the control plane call `fleet`; nothing here calls them.
"""
