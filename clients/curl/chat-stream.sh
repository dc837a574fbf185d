#!/usr/bin/env bash
# The same as a stream: a role, pieces of text, a finish reason, the token counts, [DONE].
set -euo pipefail
url=${HEADWATER_URL:-http://127.0.0.1:8000}
key=(${HEADWATER_API_KEY:+-H "Authorization: Bearer $HEADWATER_API_KEY"})

curl -sS --fail-with-body -N "${key[@]}" "$url/v1/chat/completions" \
  -H 'Content-Type: application/json' -d '{
    "messages": [{"role": "user", "content": "Why do rivers bend?"}],
    "max_tokens": 64,
    "stream": true,
    "stream_options": {"include_usage": true}
  }'
