"""Weights from storage to device.

Invariant: a loader returns a complete model or raises InvalidCheckpoint; nothing half-loaded escapes.
"""
