#!/usr/bin/env bash
# A response as events.
set -euo pipefail
url=${HEADWATER_URL:-http://127.0.0.1:8000}
key=(${HEADWATER_API_KEY:+-H "Authorization: Bearer $HEADWATER_API_KEY"})

curl -sS --fail-with-body -N "${key[@]}" "$url/v1/responses" \
  -H 'Content-Type: application/json' -d '{
    "input": "Why do rivers bend?",
    "max_output_tokens": 16,
    "stream": true
  }'
