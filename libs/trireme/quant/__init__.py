"""Weights in few bits: number formats, packing, and checkpoints that hold them.

Invariant: codes and scales are the truth. What a device wants in another order is derived from them under a
layout id of its own, and whatever does not read back as exactly these codes is an error, never a guess.
"""
