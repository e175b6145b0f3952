"""A stand-in for the power in tests of the supervisor."""
