"""`python -m trireme.power` where the stand-ins come first on the path."""

from stand_in import main

main("power")
