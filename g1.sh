. .gpu/*/activate.sh; nvcc --version 2>&1 | tail -1; ls ~/models
t0=$SECONDS
run() { local s=$1 n=$2; shift 2; timeout -s INT $s "$@" >$OUT/$n.log 2>&1; echo "== $n: exit $? at $((SECONDS-t0))"; }
cp benchmarks/results/compatibility_gpu.json $OUT/
(export CUDA_VISIBLE_DEVICES=1
 run 560 kernels make --no-print-directory test-gpu-kernels JOBS=18 ARGS="--durations=5"
 run 60 cost python3 -m pytest -q -p no:cacheprovider tests/test_saturation.py -k alone; tail -3 $OUT/cost.log) &
(export CUDA_VISIBLE_DEVICES=0
 run 300 decode python3 scripts/bench_decode.py --preset all --jobs 11 --out $OUT
 run 90 fill python3 scripts/bench_fill.py --out $OUT
 run 100 ncu python3 scripts/profile_kernels.py --out $OUT
 run 90 demo make --no-print-directory demo; tail -30 $OUT/demo.log
 run 150 peers python3 scripts/bench_decode.py --preset peers --name decode_peers --jobs 4 --out $OUT; tail -4 $OUT/peers.log) &
wait
tail -12 $OUT/kernels.log; grep -a -A16 "^point" $OUT/decode.log; tail -6 $OUT/fill.log; cat $OUT/ncu.log | tail -14
cd $OUT; tar czf logs.tgz *.log; rm *.log; ls
