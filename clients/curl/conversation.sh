#!/usr/bin/env bash
# A conversation: made, added to, answered in, read, and deleted, one item of it first.
set -euo pipefail
url=${HEADWATER_URL:-http://127.0.0.1:8000}
key=(${HEADWATER_API_KEY:+-H "Authorization: Bearer $HEADWATER_API_KEY"})

conversation=$(curl -sS --fail-with-body "${key[@]}" "$url/v1/conversations" \
  -H 'Content-Type: application/json' -d '{
    "items": [{"role": "user", "content": "My name is Ada."}]
  }' | grep -o 'conv_[0-9a-f]*')
item=$(curl -sS --fail-with-body "${key[@]}" "$url/v1/conversations/$conversation/items" \
  -H 'Content-Type: application/json' -d '{
    "items": [{"role": "user", "content": "I like rivers."}]
  }' | grep -o 'msg_[0-9a-f]*' | head -n 1)
curl -sS --fail-with-body "${key[@]}" "$url/v1/responses" -o /dev/null \
  -H 'Content-Type: application/json' -d "{
    \"conversation\": \"$conversation\",
    \"input\": \"Which one is the longest?\",
    \"max_output_tokens\": 24
  }"
curl -sS --fail-with-body "${key[@]}" "$url/v1/conversations/$conversation/items/$item" -w '\n'
curl -sS --fail-with-body -X DELETE "${key[@]}" "$url/v1/conversations/$conversation/items/$item" -w '\n'
curl -sS --fail-with-body "${key[@]}" "$url/v1/conversations/$conversation/items" -w '\n'
curl -sS --fail-with-body "${key[@]}" "$url/v1/conversations/$conversation" -o /dev/null \
  -H 'Content-Type: application/json' -d '{"metadata": {"topic": "rivers"}}'
curl -sS --fail-with-body "${key[@]}" "$url/v1/conversations/$conversation" -w '\n'
curl -sS --fail-with-body -X DELETE "${key[@]}" "$url/v1/conversations/$conversation" -w '\n'
