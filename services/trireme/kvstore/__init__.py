"""The DRAM and SSD tiers of one node's KV cache: locations by gRPC, bytes by shared memory.

Invariant: nothing that happens here is ever more than a cache miss to the rest of the fleet.
"""
