#!/usr/bin/env bash
# One answer on Anthropic's wire.
set -euo pipefail
url=${HEADWATER_URL:-http://127.0.0.1:8000}
key=(${HEADWATER_API_KEY:+-H "Authorization: Bearer $HEADWATER_API_KEY"})

curl -sS --fail-with-body "${key[@]}" "$url/v1/messages" -w '\n' \
  -H 'Content-Type: application/json' -d '{
    "system": "You answer briefly.",
    "messages": [{"role": "user", "content": "Why do rivers bend?"}],
    "max_tokens": 24
  }'
