"""Redis Streams: facts, consumer groups, request records and the registry of living processes.

Invariant: a fact is acknowledged only after its effect is durable, and every effect
is guarded by the request's attempt number, so handling a fact twice does no harm.
"""
