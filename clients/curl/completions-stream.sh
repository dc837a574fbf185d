#!/usr/bin/env bash
# The continuation of a text, as a stream.
set -euo pipefail
url=${HEADWATER_URL:-http://127.0.0.1:8000}
key=(${HEADWATER_API_KEY:+-H "Authorization: Bearer $HEADWATER_API_KEY"})

curl -sS --fail-with-body -N "${key[@]}" "$url/v1/completions" \
  -H 'Content-Type: application/json' -d '{
    "prompt": "The river bends because",
    "max_tokens": 32,
    "stream": true
  }'
