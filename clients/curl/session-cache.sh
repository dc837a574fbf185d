#!/usr/bin/env bash
# Where the KV of a session is, and what its last turn found of it.
set -euo pipefail
url=${HEADWATER_URL:-http://127.0.0.1:8000}
key=(${HEADWATER_API_KEY:+-H "Authorization: Bearer $HEADWATER_API_KEY"})

session=$(curl -sS --fail-with-body "${key[@]}" "$url/v1/sessions" \
  -H 'Content-Type: application/json' -d '{"defaults": {"max_tokens": 24}}' |
  grep -o 'sess_[0-9a-f]*')
curl -sS --fail-with-body "${key[@]}" "$url/v1/sessions/$session/turns" -o /dev/null \
  -H 'Content-Type: application/json' -d '{"input": "Why do rivers bend?"}'
curl -sS --fail-with-body "${key[@]}" "$url/v1/sessions/$session/cache" -w '\n'
