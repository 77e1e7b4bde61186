"""Kills everything in turn, then checks every event: `python -m tests.chaos --help`."""
