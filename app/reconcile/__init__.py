"""Reconciling: the Channel Manager's list against our ledger, so that an event that never came costs no order."""
