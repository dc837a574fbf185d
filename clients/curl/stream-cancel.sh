#!/usr/bin/env bash
# A resumable chat that is left, and cancelled by the name of its stream.
set -euo pipefail
url=${HEADWATER_URL:-http://127.0.0.1:8000}
key=(${HEADWATER_API_KEY:+-H "Authorization: Bearer $HEADWATER_API_KEY"})

generation=$(curl -sS --fail-with-body -N "${key[@]}" "$url/v1/chat/completions" \
  2> /dev/null -H 'Content-Type: application/json' -d '{
    "messages": [{"role": "user", "content": "Tell me a long story."}],
    "max_tokens": 400,
    "resumable": true,
    "stream": true
  }' | sed -n 's/.*"generation":"\(gen_[0-9a-f]*\)".*/\1/p;/gen_/q' || true)
curl -sS --fail-with-body -X DELETE "${key[@]}" "$url/v1/streams/$generation" -w '\n'
