"""What orchestrators are to remember, in the live store: `write` keeps it."""
