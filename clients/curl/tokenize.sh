#!/usr/bin/env bash
# A text as token ids, with the piece of text that each stands for.
set -euo pipefail
url=${HEADWATER_URL:-http://127.0.0.1:8000}
key=(${HEADWATER_API_KEY:+-H "Authorization: Bearer $HEADWATER_API_KEY"})

curl -sS --fail-with-body "${key[@]}" "$url/tokenize" -w '\n' \
  -H 'Content-Type: application/json' -d '{"text": "Why do rivers bend?"}'
