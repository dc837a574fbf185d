#!/usr/bin/env bash
# A turn whose answer comes as events: start, delta, done.
set -euo pipefail
url=${HEADWATER_URL:-http://127.0.0.1:8000}
key=(${HEADWATER_API_KEY:+-H "Authorization: Bearer $HEADWATER_API_KEY"})

session=$(curl -sS --fail-with-body "${key[@]}" "$url/v1/sessions" \
  -H 'Content-Type: application/json' -d '{"defaults": {"max_tokens": 24}}' |
  grep -o 'sess_[0-9a-f]*')
curl -sS --fail-with-body -N "${key[@]}" "$url/v1/sessions/$session/turns" \
  -H 'Content-Type: application/json' -d '{
    "input": "Why do rivers bend?",
    "stream": true
  }'
