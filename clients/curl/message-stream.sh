#!/usr/bin/env bash
# An answer on Anthropic's wire, token by token.
set -euo pipefail
url=${HEADWATER_URL:-http://127.0.0.1:8000}
key=(${HEADWATER_API_KEY:+-H "Authorization: Bearer $HEADWATER_API_KEY"})

curl -sS --fail-with-body -N "${key[@]}" "$url/v1/messages" \
  -H 'Content-Type: application/json' -d '{
    "messages": [{"role": "user", "content": "Why do rivers bend?"}],
    "max_tokens": 16,
    "stream": true
  }'
