#!/usr/bin/env bash
# Goes on with an answer that was begun for the model.
set -euo pipefail
url=${HEADWATER_URL:-http://127.0.0.1:8000}
key=(${HEADWATER_API_KEY:+-H "Authorization: Bearer $HEADWATER_API_KEY"})

curl -sS --fail-with-body "${key[@]}" "$url/v1/chat/completions" -w '\n' \
  -H 'Content-Type: application/json' -d '{
    "messages": [
      {"role": "user", "content": "Why do rivers bend?"},
      {"role": "assistant", "content": "Rivers bend because"}
    ],
    "continue_final_message": true,
    "max_tokens": 32
  }'
