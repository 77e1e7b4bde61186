"""A sender that misbehaves and an audit of every order, for `ota-receiver simulate` and tests/chaos.

`plan` draws what is sent, `sender` sends it and keeps each answer, `audit` compares this with what was fetched and
stored, `run` is one simulation from the first process to the report. The events come from here and not from the
sandbox, so that each POST's answer and time are known. The seed repeats what is sent; times are the clock's.
"""
