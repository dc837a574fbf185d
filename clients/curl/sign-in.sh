#!/usr/bin/env bash
# As the web page does it: the key once, then a cookie (none where the server has no keys).
set -euo pipefail
url=${HEADWATER_URL:-http://127.0.0.1:8000}
key=(${HEADWATER_API_KEY:+-H "Authorization: Bearer $HEADWATER_API_KEY"})
cookies=$(mktemp)
trap 'rm -f "$cookies"' EXIT

curl -sS --fail-with-body -c "$cookies" "${key[@]}" "$url/v1/login" -w '%{http_code}\n' \
  -H 'Content-Type: application/json' -d "{\"api_key\": \"${HEADWATER_API_KEY:-none}\"}"
key=(-b "$cookies" -H "Origin: $url")
curl -sS --fail-with-body "${key[@]}" "$url/v1/models" -w '\n'
curl -sS --fail-with-body -X POST "${key[@]}" "$url/v1/logout" -w '%{http_code}\n'
