"""A stand-in for the worker in tests of the supervisor."""
