"""The only access to the Channel Manager: the client of its API and the values of its answers."""
