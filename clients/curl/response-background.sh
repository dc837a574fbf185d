#!/usr/bin/env bash
# A response in the background: its events after the third one, and an end before its time.
set -euo pipefail
url=${HEADWATER_URL:-http://127.0.0.1:8000}
key=(${HEADWATER_API_KEY:+-H "Authorization: Bearer $HEADWATER_API_KEY"})

response=$(curl -sS --fail-with-body "${key[@]}" "$url/v1/responses" \
  -H 'Content-Type: application/json' -d '{
    "input": "Why do rivers bend?",
    "max_output_tokens": 16,
    "background": true
  }' | grep -o 'resp_[0-9a-f]*' | head -n 1)
curl -sS --fail-with-body "${key[@]}" "$url/v1/responses/$response?stream=true&starting_after=2"
curl -sS --fail-with-body -X POST "${key[@]}" "$url/v1/responses/$response/cancel" -w '\n'
