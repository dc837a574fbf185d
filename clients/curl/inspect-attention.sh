#!/usr/bin/env bash
# What the last of six tokens looks at, by every head of one layer.
set -euo pipefail
url=${HEADWATER_URL:-http://127.0.0.1:8000}
key=(${HEADWATER_API_KEY:+-H "Authorization: Bearer $HEADWATER_API_KEY"})

curl -sS --fail-with-body "${key[@]}" "$url/v1/inspect/attention" -w '\n' \
  -H 'Content-Type: application/json' \
  -d '{"text": "Sarah fed the cat because it", "layer": 1, "head": "all", "queries": [5]}'
