#!/usr/bin/env bash
# How many tokens the prompt of a response has.
set -euo pipefail
url=${HEADWATER_URL:-http://127.0.0.1:8000}
key=(${HEADWATER_API_KEY:+-H "Authorization: Bearer $HEADWATER_API_KEY"})

curl -sS --fail-with-body "${key[@]}" "$url/v1/responses/input_tokens" -w '\n' \
  -H 'Content-Type: application/json' -d '{
    "input": "Why do rivers bend?",
    "instructions": "You answer briefly."
  }'
