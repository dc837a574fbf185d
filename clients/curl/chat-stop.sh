#!/usr/bin/env bash
# Ends before a string (stop): the string itself is not in the answer.
set -euo pipefail
url=${HEADWATER_URL:-http://127.0.0.1:8000}
key=(${HEADWATER_API_KEY:+-H "Authorization: Bearer $HEADWATER_API_KEY"})

curl -sS --fail-with-body "${key[@]}" "$url/v1/chat/completions" -w '\n' \
  -H 'Content-Type: application/json' -d '{
    "messages": [{"role": "user", "content": "Count from one to nine, in words."}],
    "stop": ["e"],
    "max_tokens": 32
  }'
