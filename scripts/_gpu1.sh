set -u
(timeout 100 python3 -m pytest -q -n 14 -p no:cacheprovider --maxfail=60 tests/test_decode.py tests/test_fill.py tests/test_attention.py > $OUT/tests.log 2>&1; grep -E "^(FAILED)|passed|failed" $OUT/tests.log | cut -c1-150| tail -30)
timeout 200 python3 scripts/bench_decode.py --out $OUT --name d1 --shapes 32x8x128 --loads 64x4096,1x131072,8x512,1x512 --pages 64 --contenders kvq:fp8_per_token_head,kvq:int8_per_token_head,kvq:k8v4,kvq:int4_per_token_head,kvq:int2,lmdeploy:0 2>&1 | grep -E "^(kvq|lmd|contender)"
timeout 200 python3 scripts/bench_decode.py --jobs 8 --out $OUT --name d2 --shapes 16x2x128,28x4x128 --loads 64x4096,1x131072,8x512 --pages 64 --contenders kvq:fp8_per_token_head,lmdeploy:0 2>&1 | grep -E "^(kvq|lmd|contender)"
T="timeout 60 python3 scripts/tune_decode.py --out $OUT --loads 64x4096,8x512 --pages 64 --all"
$T --formats int8_per_token_head,int4_per_token_head,k8v4,int2 --num-warps 2 --occupancy 8 --maxnreg 128 --num-stages 2 --block-n 64,128 2>&1 | grep "^32"
$T --formats int8_per_token_head,int4_per_token_head,fp8_per_token_head --num-warps 4 --occupancy 3,4 --maxnreg 0,128 --num-stages 2 --block-n 128 2>&1 | grep "^32"
timeout 60 python3 scripts/bench_fill.py --out $OUT --shapes 8x128 --loads decode:1,decode:64,decode:256,prefill:8192 --formats fp8_per_token_head,int8_per_token_head,int4_per_token_head 2>&1 | grep -E "^(kvq|lmd|contender)"
