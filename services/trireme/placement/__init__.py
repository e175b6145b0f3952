"""The placement service: it owns the desired fleet and keeps the living workers equal to it.

Invariant: a worker process outlives placement; a placement that comes back adopts what lives
and starts only what is missing.
"""
