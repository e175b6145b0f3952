"""Decisions as pure code: no I/O, no clock, no torch; time and randomness are passed in."""
