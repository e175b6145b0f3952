"""KV blocks: identity, the engine's pool, tiers below it and their transport.

Invariant: a block that is bad, late or missing is a miss, never an error or a stall.
"""
