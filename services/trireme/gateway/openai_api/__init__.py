"""The OpenAI-compatible HTTP API.

Invariant: a field of a request is honoured or rejected by name, never ignored, and an error
is a status before the first byte and an `error` event after it.
"""
