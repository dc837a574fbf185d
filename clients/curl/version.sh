#!/usr/bin/env bash
# The server's version and the id of the model.
set -euo pipefail
url=${HEADWATER_URL:-http://127.0.0.1:8000}

curl -sS --fail-with-body "$url/version" -w '\n'
