"""What our processes say to each other, as msgspec structs: the only shapes that cross a border.

`documents`: the files of a generation, written by render, read by daemons and the control plane.
`machine`: what a controller asks of a machine and what it answers.
`link`: the daemon's WebSocket to the control plane.
`http`: the bodies of the HTTP API.
"""
