"""The only door to Redis: intake, ledger, budget and counters, each step one script."""
