"""A stand-in for the scheduler in tests of the supervisor."""
