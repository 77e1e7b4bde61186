"""Everything is killed in turn, and then every event is asked for: `python -m tests.chaos --help`."""
