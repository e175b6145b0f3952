"""The scheduler: reads admitted requests, decides with `policies/`, writes assignments.

Invariant: it owns no state. What it knows it reads from the bus, and every effect is one
atomic script guarded by the request's attempt, so any number of replicas run side by side.
"""
