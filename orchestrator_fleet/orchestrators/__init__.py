"""The life of an orchestrator: what is seen of it, what may be done to it, what it asks, is told and says.

presence attendance board    its status, whether its daemon is there, what it has before it
access keyring issue         whose a key is and what it may do; which are revoked, when used; what a key's entry says
pause actions                letting it rest; the log of what people did to it
coordination                 the state machine of what one asks of another; its kinds:
  passing delegation handoff    a task goes on to another
  escalation collaboration      a task waits for a yes from above; others do a part of it
  asked carried                 all kinds looked at and answered; what they bring along to the next session
notices conversation updates what it is told, what it says to others, and of its work
conflicts conflict_board     what stands against what: found, and read
"""
