#!/usr/bin/env python3
"""The saturation counter behind the stock server: a model whose keys exceed fp8's range, with scale 1.0 and calibrated.

  scripts/saturation_check.py [--model MODEL]
  scripts/saturation_check.py --tp 2 [--executor mp]

With --tp, a random Llama with eight KV heads is the model, and the first GPU's heads are what is counted.
Prints the largest share of any layer from the metrics endpoint; exit code 1 unless scale 1.0 shows more than a tenth of
the K codes at the limit and calibrated scales less than a thousandth, of every layer. One GPU, about three minutes: the
server takes its engine's counts every ten seconds.
"""
from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

from calibration_gain import FMT, write_model
from random_models import write_sharp
from server import Server
from smollm2 import HOME

LINE = re.compile(r'^lmdeploy_kvq:saturated_share\{.*tensor="k".*\} (\S+)$', re.M)


def shares(server: Server) -> list[float]:
    """K's shares of the layers sampled so far."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy cannot reach 127.0.0.1
    with opener.open(server.url + '/metrics/', timeout=30) as answer:
        return [float(share) for share in LINE.findall(answer.read().decode())]


def shares_under_load(server: Server, layers: int, patience: float = 75) -> list[float]:
    """Load the server until every layer has been sampled, or for ``patience`` seconds; K's shares of the layers."""
    deadline = time.monotonic() + patience
    while len(found := shares(server)) < layers and time.monotonic() < deadline:
        server.load(8, 512)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--model', type=Path, default=HOME)
    parser.add_argument('--factor', type=float, default=200.0)
    parser.add_argument('--tp', type=int, default=1)
    parser.add_argument('--executor', choices=('ray', 'mp'), help='for --tp; default: what LMDeploy chooses (Ray)')
    args = parser.parse_args()
    found = []
    parallel = ['--tp', str(args.tp)] if args.tp > 1 else []
    if args.executor:
        parallel += ['--distributed-executor-backend', args.executor]
    with tempfile.TemporaryDirectory() as work:
        source, folder, scales = args.model.expanduser(), Path(work, 'model'), Path(work, 'scales.safetensors')
        if args.tp > 1:
            source = Path(work, 'llama')
            write_sharp(source, args.model.expanduser(), vocabulary=None, layers=4, heads=8, kv_heads=8)
        layers = write_model(source, folder, args.factor).num_hidden_layers
        subprocess.run([sys.executable, '-m', 'lmdeploy_kvq.cli', 'calibrate', str(folder), '-o', str(scales)],
                       check=True, timeout=240)
        for extra in ([], ['--kv-scales', str(scales)]):
            with Server(str(folder), ['--quant-policy', FMT.name, '--max-batch-size', '16', '--session-len', '2048',
                                      '--cache-max-entry-count', '0.3', *parallel, *extra], timeout=150) as server:
                found.append(shares_under_load(server, layers))
    for name, values in zip(('scale 1.0', 'calibrated'), found):
        print(f'{name}: {len(values)} layers, largest share of K at the limit {max(values, default=float("nan")):.5f}')
    return 0 if all(len(values) == layers for values in found) and max(found[0]) > 0.1 and max(found[1]) < 1e-3 else 1


if __name__ == '__main__':
    sys.exit(main())
