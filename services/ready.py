#!/usr/bin/env python
"""`ready URL`: end with status 0 where the URL answers 200; for health checks of containers without curl."""

import sys
import urllib.error
import urllib.request

try:
    with urllib.request.urlopen(sys.argv[1], timeout=3) as response:
        print(response.read().decode(), end="")
except urllib.error.HTTPError as error:
    sys.exit(f"{error.code}: {error.read().decode().strip()}")
except OSError as error:
    sys.exit(str(error))
