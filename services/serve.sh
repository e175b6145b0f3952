#!/bin/sh
# The image's entry: run the service named, or else the one that the image was built for.
service=${1:-${TRIREME_SERVICE:-all}}
[ "$service" != all ] || { echo "serve: say which: gateway, scheduler, worker, kvstore, power or placement" >&2; exit 2; }
exec python -m "trireme.$service"
