"""The model that test_ledger_property.py holds the real scripts against: an upstream, workers, faults, and a book."""
