#!/usr/bin/env bash
# A conversation as the token ids that the model sees, special tokens and all.
set -euo pipefail
url=${HEADWATER_URL:-http://127.0.0.1:8000}
key=(${HEADWATER_API_KEY:+-H "Authorization: Bearer $HEADWATER_API_KEY"})

curl -sS --fail-with-body "${key[@]}" "$url/tokenize" -w '\n' \
  -H 'Content-Type: application/json' -d '{
    "messages": [{"role": "user", "content": "Why do rivers bend?"}]
  }'
