#!/usr/bin/env bash
# The shape of the served model: blocks, heads, projections, parameters.
set -euo pipefail
url=${HEADWATER_URL:-http://127.0.0.1:8000}
key=(${HEADWATER_API_KEY:+-H "Authorization: Bearer $HEADWATER_API_KEY"})

curl -sS --fail-with-body "${key[@]}" "$url/v1/inspect/model" -w '\n'
