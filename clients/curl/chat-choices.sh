#!/usr/bin/env bash
# Three different answers to one question (n); the prompt is computed and counted once.
set -euo pipefail
url=${HEADWATER_URL:-http://127.0.0.1:8000}
key=(${HEADWATER_API_KEY:+-H "Authorization: Bearer $HEADWATER_API_KEY"})

curl -sS --fail-with-body "${key[@]}" "$url/v1/chat/completions" -w '\n' \
  -H 'Content-Type: application/json' -d '{
    "messages": [{"role": "user", "content": "Name a river."}],
    "n": 3,
    "temperature": 1.0,
    "max_tokens": 24
  }'
