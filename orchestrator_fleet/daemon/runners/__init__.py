"""What a session is: how a claimed task becomes a process. One module per runner type of fleet.yaml."""
