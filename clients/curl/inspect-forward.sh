#!/usr/bin/env bash
# What the model says after each token, and what two of its layers would say.
set -euo pipefail
url=${HEADWATER_URL:-http://127.0.0.1:8000}
key=(${HEADWATER_API_KEY:+-H "Authorization: Bearer $HEADWATER_API_KEY"})

curl -sS --fail-with-body "${key[@]}" "$url/v1/inspect/forward" -w '\n' \
  -H 'Content-Type: application/json' \
  -d '{"text": "Sarah fed the cat because it", "top_k": 5, "layers": [0, 1]}'
