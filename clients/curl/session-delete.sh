#!/usr/bin/env bash
# The end of a session: its text, tokens, logs and KV. Then it is no longer in the list.
set -euo pipefail
url=${HEADWATER_URL:-http://127.0.0.1:8000}
key=(${HEADWATER_API_KEY:+-H "Authorization: Bearer $HEADWATER_API_KEY"})

session=$(curl -sS --fail-with-body "${key[@]}" "$url/v1/sessions" \
  -H 'Content-Type: application/json' -d '{"defaults": {"max_tokens": 24}}' |
  grep -o 'sess_[0-9a-f]*')
curl -sS --fail-with-body -X DELETE "${key[@]}" "$url/v1/sessions/$session"
curl -sS --fail-with-body "${key[@]}" "$url/v1/sessions?limit=1" -w '\n'
