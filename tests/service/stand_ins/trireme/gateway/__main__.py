"""`python -m trireme.gateway` where the stand-ins come first on the path."""

from stand_in import main

main("gateway")
