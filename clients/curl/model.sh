#!/usr/bin/env bash
# The served model by its id, which is taken from the list first.
set -euo pipefail
url=${HEADWATER_URL:-http://127.0.0.1:8000}
key=(${HEADWATER_API_KEY:+-H "Authorization: Bearer $HEADWATER_API_KEY"})

id=$(curl -sS --fail-with-body "${key[@]}" "$url/v1/models" | sed -E 's/.*"id":"([^"]+)".*/\1/')
curl -sS --fail-with-body "${key[@]}" "$url/v1/models/$id" -w '\n'
