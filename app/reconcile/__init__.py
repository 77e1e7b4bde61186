"""Reconciling: the Channel Manager's order list compared with the orders here, so that a lost event costs no order."""
