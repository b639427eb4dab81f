#!/usr/bin/env bash
# Everything that needs one GPU, in about eight minutes: kernel tests, engine matrix and accuracy side by side, then the
# timed benchmarks alone. Results and logs go to a folder; copy its JSON files to benchmarks/results.
# Usage: gpu_session.sh OUT   (SmolLM2 in ~/models/smollm2; KVQ_COMMIT names the commit where the tree has no git)
set -u
out=$1; mkdir -p "$out"
for name in fill flatten decode; do
  (timeout 330 python3 -m pytest -q -p no:cacheprovider "tests/test_$name.py" >"$out/test_$name.log" 2>&1) &
done
(timeout 330 python3 scripts/engine_matrix.py --jobs 8 --out "$out" >"$out/matrix.log" 2>&1;
 timeout 200 python3 scripts/eval_engine.py --jobs 8 --out "$out" >"$out/accuracy.log" 2>&1) &
wait
for name in fill flatten decode; do
  echo "== test_$name"; grep -a "^FAILED\|^ERROR\|^E  \|passed\|failed" "$out/test_$name.log" | tail -8
done
for name in matrix accuracy; do echo "== $name"; grep -v Warn "$out/$name.log" | tail -50 | cut -c1-160; done
timeout 200 python3 scripts/bench_decode.py --shapes 32x8x128 --loads 64x4096,1x131072,256x1024,ragged:64,1x128,8x512 \
  --contenders lmdeploy:0,lmdeploy:16,lmdeploy:8,lmdeploy:4,kvq:fp8_per_token_head,kvq:fp8_e5m2_per_token_head,kvq:int8_per_token_head,kvq:fp8,kvq:fp8_e5m2 \
  --out "$out" 2>&1 | grep -v Warn
timeout 60 python3 scripts/bench_fill.py --shapes 8x128 --out "$out" 2>&1 | grep -v Warn
