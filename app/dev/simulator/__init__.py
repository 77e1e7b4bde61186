"""A sender that misbehaves and an audit of every order, for `ota-receiver simulate` and tests/chaos.

`run` is one simulation from its plan to the report, `sender` sends the events and keeps each answer, `audit` compares
this with what was fetched and stored. The events come from here and not from the sandbox, so that each POST's answer
and time are known. The seed repeats what is sent; times are the clock's.
"""
