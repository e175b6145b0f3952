"""Calls that nobody should send, to every RPC and route that a gateway says it has."""
