#!/usr/bin/env bash
# The same twenty tokens with the KV cache and without it, by the clock.
set -euo pipefail
url=${HEADWATER_URL:-http://127.0.0.1:8000}
key=(${HEADWATER_API_KEY:+-H "Authorization: Bearer $HEADWATER_API_KEY"})

curl -sS --fail-with-body "${key[@]}" "$url/v1/inspect/kv-cache" -w '\n' \
  -H 'Content-Type: application/json' \
  -d '{"messages": [{"role": "user", "content": "Why do rivers bend?"}], "max_tokens": 20}'
