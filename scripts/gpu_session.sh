#!/usr/bin/env bash
# Everything that needs a GPU, in parts. Results and logs go to a folder; copy its JSON files to benchmarks/results.
# Usage: gpu_session.sh OUT PART...   (SmolLM2 in ~/models/smollm2; KVQ_COMMIT names the commit where git does not)
#   kernels   the kernels' tests: two minutes on 18 cores
#   matrix    graphs, prefix cache and chunks against eager engines, every format: about four minutes
#   features  block sizes, a full pool, aborts, prefill graphs, long context, hostile requests: about three minutes
#   tools     calibrated scales and transforms, metrics, eval: about five minutes
#   ways      adapters, pictures, hybrid models, drafts, older LMDeploy, updates, faults: about four minutes
#   update    live weight updates and sleep, and blocks per byte: two minutes
#   pairs     what needs two GPUs: about eight minutes
#   plan      the plan against what engines allocate, on an empty GPU: two minutes
#   engines   the engines' tests that TESTS selects (default: all that share a GPU)
#   accuracy  accuracy of every format, and what transforms gain: about six minutes
#   bench     decode and fill, timed alone and one after the other, counters and clocks: about eight minutes
#   peers     FlashInfer beside us, where it is installed
#   engine    an 8B model end to end, and prefill: about eight minutes
#   faults    killed engines, hostile requests, model folders side by side, then memory: about five minutes
#   soak      three servers under load, side by side, for MINUTES (default 5.5), and four to ten minutes more; SEED
#   audit     decode steps repeated, every bit compared, and cached pages read again after a load: three minutes
#   sanitize  every kernel under compute-sanitizer: up to ten minutes
#   load      on two GPUs: soak on one, and every engine's test on the other, then on both, meanwhile
#   two       on two GPUs: kernels, then bench on one and engine on the other, then engines on both: twelve minutes
# Tests add their outcomes to OUT/compatibility_gpu.json, and leave their programs' files there. Whatever runs is
# interrupted END seconds (default 580) after the start, so that it can still write what it has. What takes longer than a
# call may, or one GPU's parts beside another's, from a copy that later calls do not touch:
#   cp -a . ~/copy; cd ~/copy; CUDA_VISIBLE_DEVICES=1 END=1500 setsid nohup scripts/gpu_session.sh ~/results matrix ways &
set -u
out=$1; shift; mkdir -p "$out"
start=$SECONDS
run() {  # run SECONDS NAME COMMAND...: log to OUT/NAME.log, then its last lines
  local limit=$1 name=$2 left=$((${END:-580} - SECONDS + start)); shift 2
  ((left > 5)) || { echo "== $name: no time left"; return; }
  timeout -s INT -k 15 $((limit < left ? limit : left)) "$@" >"$out/$name.log" 2>&1
  echo "== $name: exit $?, after $((SECONDS - start)) s"
  grep -v 'Warn\|INFO\|it/s' "$out/$name.log" | tail -25 | cut -c1-180
}
# What is installed may be another folder, the one that this is a copy of.
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
# An engine whose PyTorch compiles something starts a process per core for it: with sixteen engines, five hundred.
export TORCHINDUCTOR_COMPILE_THREADS=1
tests() {  # SECONDS NAME WORKERS TESTS
  [ -f "$out/compatibility_gpu.json" ] || cp benchmarks/results/compatibility_gpu.json "$out/"
  run "$1" "$2" make --no-print-directory test-gpu-engines ENGINES="$3" \
    ARGS="--durations=0 --evidence $out/compatibility_gpu.json --results $out -k '$4'"
}
again() { END=$((${END:-580} - SECONDS + start)) "$0" "$out" "$@"; }  # this script, for the time that is left
for part in "$@"; do
  echo "== $part begins, $((SECONDS - start)) s"
  case $part in
  kernels) run 400 kernels make --no-print-directory test-gpu-kernels JOBS="${JOBS:-$(($(nproc) * 9 / 16))}" ;;
  matrix) tests 500 matrix 1 'graphs_give or fewer_at or prefix_cache_and or depend_on_the or exact_prompt' ;;
  features)
    features='block_sizes or kernel_blocks or prefixes_in_a_pool or requests_cut or chunks_in_an or piecewise_graphs'
    tests 400 features 4 "$features or 128k_tokens or test_dllm or stock_server or level_two or hostile" ;;
  tools) tests 600 tools 4 'not two and (calibrated or calibration_while or metrics_endpoint or eval_measures)' ;;
  ways)
    ways='adapters or qwen2_vl or picture or qwen3_next or qwen3_5 or acceptance or older_engine or blocks_take'
    tests 600 ways 4 "$ways or live_updates or ten_thousand or engine_is_killed or missing" ;;
  update) tests 300 update 2 'live_updates or blocks_take' ;;
  pairs) tests 600 pairs 2 'two_gpus or two_data' ;;
  plan) tests 300 plan 1 alone_the_plan ;;
  engines)
    tests 580 engines "${ENGINES:-5}" "(${TESTS:-test}) and not alone"
    run 60 cost python3 -m pytest -q -p no:cacheprovider tests/test_saturation.py -k alone ;;
  accuracy)
    run 400 accuracy python3 scripts/eval_engine.py --jobs 10 --out "$out"
    run 300 transforms python3 scripts/transform_gain.py --out "$out" ;;
  bench)
    run 400 decode python3 scripts/bench_decode.py --preset all --out "$out"
    run 150 fill python3 scripts/bench_fill.py --out "$out"
    run 100 layer python3 scripts/bench_layer.py --out "$out"
    run 150 counters python3 scripts/profile_kernels.py --out "$out"
    run 60 clocks python3 scripts/decode_clocks.py --out "$out" ;;
  peers) run 300 peers python3 scripts/bench_decode.py --preset peers --name decode_peers --out "$out" ;;
  engine)
    run 500 engine python3 scripts/bench_engine.py --out "$out" \
      --policies none,fp8_per_token_head,int8_per_token_head,int4_per_token_head
    run 240 prefill python3 scripts/bench_prefill.py --out "$out" ;;
  faults)
    run 300 faults python3 -m pytest -q -n 4 --dist loadgroup -p no:cacheprovider tests/test_faults_gpu.py -k 'not alone'
    run 280 memory python3 -m pytest -q -p no:cacheprovider tests/test_faults_gpu.py -k alone_memory_runs_out ;;
  soak)
    minutes=${MINUTES:-5.5}
    run $((${minutes%.*} * 60 + 700)) soak python3 scripts/soak.py --minutes "$minutes" --parallel --out "$out" \
      --seed "${SEED:-0}" ;;
  load)
    CUDA_VISIBLE_DEVICES=0 again soak &
    CUDA_VISIBLE_DEVICES=1 again ways tools matrix update
    again pairs
    wait ;;
  audit)
    run 200 steps python3 scripts/repeat_steps.py --seconds 4 --out "$out" &
    for format in none fp8_per_token_head int4_per_token_head; do
      run 200 "audit_$format" python3 scripts/page_audit.py --format "$format" --out "$out" &
    done
    wait ;;
  sanitize) run 590 sanitize python3 scripts/sanitize.py --log "$out" --out "$out" ;;
  two)
    JOBS=${JOBS:-$(($(nproc) * 15 / 16))} again kernels
    CUDA_VISIBLE_DEVICES=0 again bench &
    CUDA_VISIBLE_DEVICES=1 again engine &
    wait
    run 260 engine_tp2 python3 scripts/bench_engine.py --tp 2 --executor mp --out "$out/tp2" \
      --policies none,fp8_per_token_head,int8_per_token_head ;;
  *) echo "unknown part: $part" >&2; exit 2 ;;
  esac
done
