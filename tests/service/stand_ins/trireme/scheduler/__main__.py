"""`python -m trireme.scheduler` where the stand-ins come first on the path."""

from stand_in import main

main("scheduler")
