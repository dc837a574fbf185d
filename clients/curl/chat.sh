#!/usr/bin/env bash
# One answer to a conversation, whole, with its token counts.
set -euo pipefail
url=${HEADWATER_URL:-http://127.0.0.1:8000}
key=(${HEADWATER_API_KEY:+-H "Authorization: Bearer $HEADWATER_API_KEY"})

curl -sS --fail-with-body "${key[@]}" "$url/v1/chat/completions" -w '\n' \
  -H 'Content-Type: application/json' -d '{
    "messages": [
      {"role": "system", "content": "You answer briefly."},
      {"role": "user", "content": "Why do rivers bend?"}
    ],
    "max_tokens": 64
  }'
