#!/usr/bin/env bash
# The log-probability of each token of an answer, and the three most probable at its place.
set -euo pipefail
url=${HEADWATER_URL:-http://127.0.0.1:8000}
key=(${HEADWATER_API_KEY:+-H "Authorization: Bearer $HEADWATER_API_KEY"})

curl -sS --fail-with-body "${key[@]}" "$url/v1/chat/completions" -w '\n' \
  -H 'Content-Type: application/json' -d '{
    "messages": [{"role": "user", "content": "Sarah fed the cat because it was"}],
    "logprobs": true,
    "top_logprobs": 3,
    "temperature": 0,
    "max_tokens": 4
  }'
