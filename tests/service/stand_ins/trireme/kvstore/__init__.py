"""A stand-in for the kvstore in tests of the supervisor."""
