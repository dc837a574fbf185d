#!/usr/bin/env bash
# A stream that is cut after its first events, and the rest of it.
set -euo pipefail
url=${HEADWATER_URL:-http://127.0.0.1:8000}
key=(${HEADWATER_API_KEY:+-H "Authorization: Bearer $HEADWATER_API_KEY"})

session=$(curl -sS --fail-with-body "${key[@]}" "$url/v1/sessions" \
  -H 'Content-Type: application/json' -d '{"defaults": {"max_tokens": 24}}' |
  grep -o 'sess_[0-9a-f]*')
generation=$(curl -sS --fail-with-body -N "${key[@]}" "$url/v1/sessions/$session/turns" \
  2> /dev/null -H 'Content-Type: application/json' -d '{
    "input": "Why do rivers bend?",
    "ignore_eos": true,
    "stream": true
  }' | sed -n 's/.*"generation":"\(gen_[0-9a-f]*\)".*/\1/p;/^id: 3/q' || true)
curl -sS --fail-with-body -N "${key[@]}" "$url/v1/streams/$generation" -H 'Last-Event-ID: 3'
