"""The `trireme` command: run a fleet on this machine, look at it, ask it.

Invariant: importing a command's module imports nothing heavy, so `trireme --help` is prompt;
a command fails with one line that says what to change, never with a traceback.
"""
