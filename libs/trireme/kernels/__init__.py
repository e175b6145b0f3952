"""Numeric operators of the models, and the metadata of a batch they share.

Invariant: models call `kernels.ops` only. `ops` is the one place where a native kernel is
chosen over the plain PyTorch reference; both take the same tensors and give the same answer
within the precision's tolerance.
"""
