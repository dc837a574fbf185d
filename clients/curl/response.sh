#!/usr/bin/env bash
# A response that is kept, another one that goes on from it, what was put in, and the end of both.
set -euo pipefail
url=${HEADWATER_URL:-http://127.0.0.1:8000}
key=(${HEADWATER_API_KEY:+-H "Authorization: Bearer $HEADWATER_API_KEY"})

first=$(curl -sS --fail-with-body "${key[@]}" "$url/v1/responses" \
  -H 'Content-Type: application/json' -d '{
    "input": "Why do rivers bend?",
    "max_output_tokens": 24
  }' | grep -o 'resp_[0-9a-f]*' | head -n 1)
second=$(curl -sS --fail-with-body "${key[@]}" "$url/v1/responses" \
  -H 'Content-Type: application/json' -d "{
    \"input\": \"And why do they flood?\",
    \"previous_response_id\": \"$first\",
    \"max_output_tokens\": 24
  }" | grep -o 'resp_[0-9a-f]*' | head -n 1)
curl -sS --fail-with-body "${key[@]}" "$url/v1/responses/$second" -w '\n'
curl -sS --fail-with-body "${key[@]}" "$url/v1/responses/$second/input_items" -w '\n'
for response in "$second" "$first"; do
  curl -sS --fail-with-body -X DELETE "${key[@]}" "$url/v1/responses/$response" -w '\n'
done
