#!/usr/bin/env bash
# The same seed twice: two requests, two lines, the same words.
set -euo pipefail
url=${HEADWATER_URL:-http://127.0.0.1:8000}
key=(${HEADWATER_API_KEY:+-H "Authorization: Bearer $HEADWATER_API_KEY"})

for _ in 1 2; do
  curl -sS --fail-with-body "${key[@]}" "$url/v1/chat/completions" -w '\n' \
    -H 'Content-Type: application/json' -d '{
      "messages": [{"role": "user", "content": "Tell me a story in one sentence."}],
      "temperature": 1.0,
      "seed": 7,
      "max_tokens": 24
    }'
done
