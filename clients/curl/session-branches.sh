#!/usr/bin/env bash
# Another answer to the same question, back to the first one, and the tree of both.
set -euo pipefail
url=${HEADWATER_URL:-http://127.0.0.1:8000}
key=(${HEADWATER_API_KEY:+-H "Authorization: Bearer $HEADWATER_API_KEY"})

session=$(curl -sS --fail-with-body "${key[@]}" "$url/v1/sessions" \
  -H 'Content-Type: application/json' -d '{"defaults": {"max_tokens": 24}}' |
  grep -o 'sess_[0-9a-f]*')
first=$(curl -sS --fail-with-body "${key[@]}" "$url/v1/sessions/$session/turns" \
  -H 'Content-Type: application/json' -d '{"input": "Why do rivers bend?"}' |
  grep -o 'turn_[0-9a-f]*' | sed -n 1p)
curl -sS --fail-with-body -X POST "${key[@]}" "$url/v1/sessions/$session/regenerate" -o /dev/null
curl -sS --fail-with-body -X PATCH "${key[@]}" "$url/v1/sessions/$session" -o /dev/null \
  -H 'Content-Type: application/json' -d "{\"head\": \"$first\"}"
curl -sS --fail-with-body "${key[@]}" "$url/v1/sessions/$session/tree" -w '\n'
