#!/usr/bin/env bash
# Does the engine take requests? 200, or 503 with the reason (and exit code 22).
set -euo pipefail
url=${HEADWATER_URL:-http://127.0.0.1:8000}
key=(${HEADWATER_API_KEY:+-H "Authorization: Bearer $HEADWATER_API_KEY"})

curl -sS --fail-with-body "${key[@]}" "$url/ready" -w '\n'
