#!/usr/bin/env bash
# Token ids as text.
set -euo pipefail
url=${HEADWATER_URL:-http://127.0.0.1:8000}
key=(${HEADWATER_API_KEY:+-H "Authorization: Bearer $HEADWATER_API_KEY"})

curl -sS --fail-with-body "${key[@]}" "$url/detokenize" -w '\n' \
  -H 'Content-Type: application/json' -d '{"tokens": [504, 328, 434, 282, 260, 267, 270, 400]}'
