#!/usr/bin/env bash
# Counters, gauges and histograms for Prometheus.
set -euo pipefail
url=${HEADWATER_URL:-http://127.0.0.1:8000}

curl -sS --fail-with-body "$url/metrics"
