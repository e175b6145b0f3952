"""Architectures written with `kernels`, and the Hugging Face checkpoints they are read from.

Invariant: on equal weights a model's float32 logits equal those of transformers within 1e-4,
alone or in a mixed batch, whole or in chunks. On weights in few bits native kernels may round
activations: then the logits are within a thousandth of their norm of those on the weights that the
codes stand for.
"""
