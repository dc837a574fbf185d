#!/usr/bin/env bash
# How many tokens a prompt has, on Anthropic's wire.
set -euo pipefail
url=${HEADWATER_URL:-http://127.0.0.1:8000}
key=(${HEADWATER_API_KEY:+-H "Authorization: Bearer $HEADWATER_API_KEY"})

curl -sS --fail-with-body "${key[@]}" "$url/v1/messages/count_tokens" -w '\n' \
  -H 'Content-Type: application/json' -d '{
    "messages": [{"role": "user", "content": "Why do rivers bend?"}]
  }'
