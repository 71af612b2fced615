"""What to do: desired x observed -> Plan. Pure; `model` says what a plan is, `between` computes it."""
