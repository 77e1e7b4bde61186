"""The ops page: what support staff and on-call people see in a browser, and what they may do there."""
