"""Architectures written with `kernels`, and the Hugging Face checkpoints they are read from.

Invariant: on equal weights a model's float32 logits equal those of transformers within 1e-4,
alone or in a mixed batch, whole or in chunks.
"""
