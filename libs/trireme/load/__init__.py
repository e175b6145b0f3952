"""Load on a fleet: plans of what arrives when, drivers that send it, reports of what came back.

Invariant: a plan is fixed by its seed before the first request leaves, and an open-loop
run never waits for answers, so a slow server cannot make its load lighter.
"""
