#!/usr/bin/env bash
# Start the stock server with a cache format, ask it one question over HTTP, stop it. Usage: serve_smoke.sh MODEL POLICY [args]
set -u
model=$1 policy=$2; shift 2
port=$((20000 + RANDOM % 9000)) log=$(mktemp)
lmdeploy serve api_server "$model" --quant-policy "$policy" --server-name 127.0.0.1 --server-port $port "$@" >"$log" 2>&1 &
server=$!
for _ in $(seq 150); do
  curl -sf "http://127.0.0.1:$port/v1/models" >/dev/null && break
  kill -0 $server 2>/dev/null || break
  sleep 1
done
grep -a "lmdeploy_kvq\|rror" "$log" | head -5
curl -s "http://127.0.0.1:$port/v1/chat/completions" -H 'Content-Type: application/json' \
  -d '{"model": "'"$model"'", "messages": [{"role": "user", "content": "What is the capital of France?"}], "max_tokens": 40, "temperature": 0}'
status=$?
echo
[ $status -eq 0 ] || tail -40 "$log"
kill $server 2>/dev/null; wait $server 2>/dev/null
exit $status
