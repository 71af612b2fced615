"""What ought to be: spec -> placement -> one immutable bundle per machine. Pure: the same input, the same bytes."""
