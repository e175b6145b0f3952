"""The gateway: clients on one side (gRPC and OpenAI HTTP), the bus and the workers on the other.

Invariant: a request that was accepted is durable on the bus, and each token index of each
choice is delivered to its client once, in order, whatever process dies in between.
"""
