"""`ota-receiver simulate`: a sender that misbehaves on purpose, and an audit of every order it told of.

The sandbox plays the Channel Manager and counts the getOrder calls; the events are sent from here, so that each
POST's answer and time are known. What is sent follows from the seed, when it is sent from the clock.
"""
