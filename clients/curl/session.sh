#!/usr/bin/env bash
# A conversation of two turns that the server keeps; then all of it, read back.
set -euo pipefail
url=${HEADWATER_URL:-http://127.0.0.1:8000}
key=(${HEADWATER_API_KEY:+-H "Authorization: Bearer $HEADWATER_API_KEY"})

session=$(curl -sS --fail-with-body "${key[@]}" "$url/v1/sessions" \
  -H 'Content-Type: application/json' -d '{"defaults": {"max_tokens": 24}}' |
  grep -o 'sess_[0-9a-f]*')
for input in "Why do rivers bend?" "And why do they flood?"; do
  curl -sS --fail-with-body "${key[@]}" "$url/v1/sessions/$session/turns" -o /dev/null \
    -H 'Content-Type: application/json' -d "{\"input\": \"$input\"}"
done
curl -sS --fail-with-body "${key[@]}" "$url/v1/sessions/$session" -w '\n'
