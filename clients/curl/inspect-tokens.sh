#!/usr/bin/env bash
# The tokens of a text, with their bytes and their places in it.
set -euo pipefail
url=${HEADWATER_URL:-http://127.0.0.1:8000}
key=(${HEADWATER_API_KEY:+-H "Authorization: Bearer $HEADWATER_API_KEY"})

curl -sS --fail-with-body "${key[@]}" "$url/v1/inspect/tokens" -w '\n' \
  -H 'Content-Type: application/json' -d '{"text": "Sarah fed the cat because it"}'
