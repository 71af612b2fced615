"""What people wrote: fleet.yaml, its includes and the charters, as checked values.

`load.load_fleet` is the one way in; it answers with a `model.Fleet` or raises `SpecInvalid` with every
diagnostic at once. Nothing to the right of here reads YAML.
"""
