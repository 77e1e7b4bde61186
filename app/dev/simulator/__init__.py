"""A sender that misbehaves, and an audit that asks for every order: for `ota-receiver simulate` and tests/chaos.

`plan` draws what `simulate` sends, `sender` sends and notes each answer, `audit` compares with what was fetched and
stored, `run` is one simulation from the first process to the report. The events are sent from here and not by the
sandbox, so each POST's answer and time are known. The seed repeats what is sent; the times are the clock's.
"""
