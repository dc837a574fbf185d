#!/usr/bin/env bash
# How probable a given text is, token by token: echo with no new tokens.
set -euo pipefail
url=${HEADWATER_URL:-http://127.0.0.1:8000}
key=(${HEADWATER_API_KEY:+-H "Authorization: Bearer $HEADWATER_API_KEY"})

curl -sS --fail-with-body "${key[@]}" "$url/v1/completions" -w '\n' \
  -H 'Content-Type: application/json' -d '{
    "prompt": "Sarah fed the cat because it was hungry",
    "echo": true,
    "logprobs": 2,
    "max_tokens": 0
  }'
