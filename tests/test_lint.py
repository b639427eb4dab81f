"""Rules of the house that no linter knows: what kernels may name, how long modules may be, who imports whom."""
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import lmdeploy_kvq as kvq
from lmdeploy_kvq import formats

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = Path(kvq.__file__).parent
MODULES = sorted(PACKAGE.rglob('*.py'))
KERNELS = sorted((PACKAGE / 'kernels').glob('*.py'))
MAX_LINES = 400

CODECS = {encoding.codec.name for fmt in kvq.FORMATS for encoding in (fmt.key, fmt.value)}
NAMES = sorted({name for known in formats.format_names() for name in (known, known.upper())} - CODECS)
FORBIDDEN = re.compile('|'.join([r'\bpolicy\s*[!=]=', r'_policy\s*[!=]=', r'\bFORMATS\b', r'\b(find|get)_format\b',
                                 rf'''(?P<quote>['"])({'|'.join(map(re.escape, NAMES))})(?P=quote)''']))


def named(source: str) -> list[str]:
    """Lines, numbered, in which a format or a policy is named."""
    return [f'{number}: {line.strip()}' for number, line in enumerate(source.splitlines(), 1) if FORBIDDEN.search(line)]


def relative(path: Path) -> str:
    """Test ids of modules."""
    return str(path.relative_to(PACKAGE))


@pytest.mark.parametrize('path', KERNELS, ids=relative)
def test_kernels_name_no_format(path):
    assert not named(path.read_text(encoding='utf-8'))


@pytest.mark.parametrize('line', ['if quant_policy == 16:', 'if fmt.policy != 8:', 'for fmt in FORMATS:', 'FORMATS[0]',
                                  "if fmt.name == 'fp8_per_token_head':", 'NAME = "FP8"', "get_format('x')"])
def test_the_rule_for_kernels_sees(line):
    assert named(line)


@pytest.mark.parametrize('line', ["'int8': DeviceCodec(encode_int8, decode_int8)", 'fmt.key.codec', '# fp8 on sm_80'])
def test_the_rule_for_kernels_allows(line):
    assert not named(line)


@pytest.mark.parametrize('path', MODULES, ids=relative)
def test_modules_stay_short(path):
    assert len(path.read_text(encoding='utf-8').splitlines()) <= MAX_LINES, 'is it still one idea?'


@pytest.mark.skipif(find_spec('importlinter') is None, reason='import-linter is not installed (extra dev)')
def test_imports_point_one_way():
    code = 'from importlinter.cli import lint_imports_command; lint_imports_command()'
    done = subprocess.run([sys.executable, '-c', code, '--no-cache'], cwd=ROOT, check=False, text=True,
                          capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr
