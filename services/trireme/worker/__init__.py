"""The worker: one process on one device slice, with an engine per variant.

Invariant: it owns a request's output until a gateway has confirmed its end, and it
acknowledges an assignment only then. Without its lease it must not go on.
"""
