"""The model that test_ledger_property.py compares the real scripts with: upstream, workers, faults and every order."""
