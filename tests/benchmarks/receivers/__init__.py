"""Receivers to compare with: an application each, which uvicorn runs as it stands.

They import nothing of this project, so that those with dependencies of their own run in an environment of their own.
`limit` is the least that a receiver can do. The others are short and written as the guides of their libraries show it:
each parses the body with json, compares every clientState in constant time, and queues one job per new order, after
`SET NX` on its id. An event is lost when one of them dies between these two commands, which no benchmark shows.
"""
