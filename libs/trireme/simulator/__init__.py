"""The fleet on a virtual clock: the live policies, real traces, modelled engines, links and disks.

Invariant: nothing here decides. What runs, what moves and where a request goes is asked of `policies/`;
equal inputs and an equal seed give equal results, bit for bit.
"""
