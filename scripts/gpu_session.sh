#!/usr/bin/env bash
# One GPU session: kernel tests, engine tests and matrix side by side, then the timed benchmarks alone.
# Usage: gpu_session.sh OUT  (results and logs; KVQ_COMMIT names the commit of the tree)
set -u
out=$1; mkdir -p "$out"
for name in fill flatten decode; do
  (timeout 330 python3 -m pytest -q -p no:cacheprovider "tests/test_$name.py" >"$out/test_$name.log" 2>&1) &
done
(timeout 330 python3 scripts/engine_matrix.py --jobs 10 --out "$out" >"$out/matrix.log" 2>&1) &
wait
for name in fill flatten decode; do echo "== test_$name"; grep -a "^FAILED\|^ERROR\|^E  \|passed\|failed" "$out/test_$name.log" | tail -${TAIL:-12}; done
grep -v Warn "$out/matrix.log" | tail -${MATRIX:-45}
