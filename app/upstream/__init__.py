"""The only door to the Channel Manager: the client of its API and the order it answers with."""
