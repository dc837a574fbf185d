#!/usr/bin/env bash
# The continuation of a text. No chat template: the model goes on from these very words.
set -euo pipefail
url=${HEADWATER_URL:-http://127.0.0.1:8000}
key=(${HEADWATER_API_KEY:+-H "Authorization: Bearer $HEADWATER_API_KEY"})

curl -sS --fail-with-body "${key[@]}" "$url/v1/completions" -w '\n' \
  -H 'Content-Type: application/json' -d '{
    "prompt": "The river bends because",
    "max_tokens": 32
  }'
