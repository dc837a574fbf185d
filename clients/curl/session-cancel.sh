#!/usr/bin/env bash
# An answer that is cancelled while it runs: leaving its stream does not stop it.
set -euo pipefail
url=${HEADWATER_URL:-http://127.0.0.1:8000}
key=(${HEADWATER_API_KEY:+-H "Authorization: Bearer $HEADWATER_API_KEY"})

session=$(curl -sS --fail-with-body "${key[@]}" "$url/v1/sessions" \
  -H 'Content-Type: application/json' -d '{"defaults": {"max_tokens": 24}}' |
  grep -o 'sess_[0-9a-f]*')
curl -sS --fail-with-body -N "${key[@]}" "$url/v1/sessions/$session/turns" 2> /dev/null \
  -H 'Content-Type: application/json' -d '{
    "input": "Tell me a long story.",
    "max_tokens": 400,
    "ignore_eos": true,
    "stream": true
  }' | sed -n '/^event: start/q' || true
curl -sS --fail-with-body -X POST "${key[@]}" "$url/v1/sessions/$session/cancel" -w '\n'
