"""A stand-in for the gateway in tests of the supervisor."""
