#!/usr/bin/env bash
# Two prompts in one request, given as token ids.
set -euo pipefail
url=${HEADWATER_URL:-http://127.0.0.1:8000}
key=(${HEADWATER_API_KEY:+-H "Authorization: Bearer $HEADWATER_API_KEY"})

curl -sS --fail-with-body "${key[@]}" "$url/v1/completions" -w '\n' \
  -H 'Content-Type: application/json' -d '{
    "prompt": [[504, 328, 434, 282, 260], [260, 328, 434]],
    "max_tokens": 8
  }'
