"""The Open Inference Protocol over gRPC: models as tensors in and out.

Invariant: a tensor or parameter of a request is honoured or refused by name, never ignored.
"""
