#!/usr/bin/env bash
# A fork that cuts the answer after five tokens, and goes on from there another way.
set -euo pipefail
url=${HEADWATER_URL:-http://127.0.0.1:8000}
key=(${HEADWATER_API_KEY:+-H "Authorization: Bearer $HEADWATER_API_KEY"})

session=$(curl -sS --fail-with-body "${key[@]}" "$url/v1/sessions" \
  -H 'Content-Type: application/json' -d '{"defaults": {"max_tokens": 24, "ignore_eos": true}}' |
  grep -o 'sess_[0-9a-f]*')
curl -sS --fail-with-body "${key[@]}" "$url/v1/sessions/$session/turns" -o /dev/null \
  -H 'Content-Type: application/json' -d '{"input": "Why do rivers bend?"}'
fork=$(curl -sS --fail-with-body "${key[@]}" "$url/v1/sessions/$session/fork" \
  -H 'Content-Type: application/json' -d '{"token": 5, "replace": 260}' | grep -o 'sess_[0-9a-f]*')
curl -sS --fail-with-body "${key[@]}" "$url/v1/sessions/$fork/continue" -w '\n' \
  -H 'Content-Type: application/json' -d '{"max_tokens": 24}'
