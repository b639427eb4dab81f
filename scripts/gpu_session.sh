#!/usr/bin/env bash
# Everything that needs one GPU. Results and logs go to a folder; copy its JSON files to benchmarks/results.
# Usage: gpu_session.sh OUT PART...   (SmolLM2 in ~/models/smollm2; KVQ_COMMIT names the commit where git does not)
#   verify  kernel tests, engine matrix, accuracy, scales, side by side: about twelve minutes
#   bench   decode and fill, timed alone, and counters of decode: about five minutes
#   engine  an 8B model end to end, and prefill: about eight minutes
#   faults  killed engines, hostile requests, model folders side by side, then memory: about five minutes
#   soak    three servers under load, side by side: about nine minutes
#   sanitize  every kernel under compute-sanitizer: up to ten minutes
set -u
out=$1; shift; mkdir -p "$out"
start=$SECONDS
run() {  # run SECONDS NAME COMMAND...: log to OUT/NAME.log, then its last lines
  local limit=$1 name=$2; shift 2
  timeout "$limit" "$@" >"$out/$name.log" 2>&1
  echo "== $name: exit $?, after $((SECONDS - start)) s"
  grep -v 'Warn\|INFO\|it/s' "$out/$name.log" | tail -25 | cut -c1-180
}
for part in "$@"; do
  case $part in
  verify)
    run 330 kernels make --no-print-directory test-gpu-kernels JOBS=6 &
    run 330 matrix python3 scripts/engine_matrix.py --jobs 7 --out "$out" &
    wait
    run 300 accuracy python3 scripts/eval_engine.py --jobs 8 --out "$out" &
    run 300 calibration python3 scripts/calibration_gain.py --engine --out "$out" &
    run 240 saturation python3 scripts/saturation_check.py &
    run 300 served python3 scripts/served_calibration.py --out "$out" &
    run 120 sleep python3 scripts/sleep_check.py ~/models/smollm2 &
    wait
    run 300 transforms python3 scripts/transform_gain.py --out "$out"
    run 100 cost python3 -m pytest -q -p no:cacheprovider tests/test_saturation.py
    run 120 demo make --no-print-directory demo ;;
  bench)
    run 300 decode python3 scripts/bench_decode.py --preset all --out "$out"
    run 100 fill python3 scripts/bench_fill.py --out "$out"
    run 90 counters python3 scripts/profile_kernels.py --out "$out" ;;
  engine)
    run 500 engine python3 scripts/bench_engine.py --out "$out" \
      --policies none,fp8_per_token_head,int8_per_token_head,int4_per_token_head
    run 240 prefill python3 scripts/bench_prefill.py --out "$out" ;;
  faults)
    run 300 faults python3 -m pytest -q -n 4 --dist loadgroup -p no:cacheprovider tests/test_faults_gpu.py -k 'not alone'
    run 280 memory python3 -m pytest -q -p no:cacheprovider tests/test_faults_gpu.py -k alone_memory_runs_out ;;
  soak) run 590 soak python3 scripts/soak.py --minutes 5.5 --parallel --out "$out" ;;
  sanitize) run 590 sanitize python3 scripts/sanitize.py --log "$out" --out "$out" ;;
  *) echo "unknown part: $part" >&2; exit 2 ;;
  esac
done
