"""Shared setup: kernels run on the GPU where there is one, else on the CPU in Triton's interpreter."""
import os
import re
import shutil
from pathlib import Path

import pytest

GPU = os.path.exists('/dev/nvidia0') and os.environ.get('CUDA_VISIBLE_DEVICES') != ''
if not GPU:
    os.environ['TRITON_INTERPRET'] = '1'  # read when triton is imported, which torch does; so before either


pytest_plugins = ['evidence']


def pytest_configure(config):
    """Declare the ``gpu`` marker; silence what Triton's interpreter does on every loop over device values."""
    folder = config.getoption('--results')
    if folder and not hasattr(config, 'workerinput'):
        config.pluginmanager.register(Failures(folder))
    config.addinivalue_line('markers', 'gpu: needs a CUDA GPU; skipped elsewhere')
    config.addinivalue_line('filterwarnings', 'ignore:Conversion of an array with ndim:DeprecationWarning:triton')


class Failures:
    """``--results``: what failed, and why, is written at once, for a session on a lent GPU may be cut off."""

    def __init__(self, folder):
        self.folder = folder

    def pytest_runtest_logreport(self, report):
        if report.failed:
            self.folder.mkdir(parents=True, exist_ok=True)
            name = re.sub(r'[^A-Za-z0-9_]+', '-', report.nodeid.partition('::')[2])
            (self.folder / f'{name}.failed.txt').write_text(report.longreprtext)


def pytest_addoption(parser):
    """The options."""
    parser.addoption('--results', type=Path, help="folder that tests leave their programs' result files in")
    parser.addoption('--whole', action='store_true', help="all combinations of format and case of the kernels' tests, "
                     'here: by default the interpreter takes one half, and a GPU the other')


def pytest_collection_modifyitems(config, items):
    """Skip tests marked ``gpu`` where kernels do not run on a GPU; leave out half of the combinations."""
    on_gpu = _device() == 'cuda'
    for item in items:
        if not on_gpu and item.get_closest_marker('gpu'):
            item.add_marker(pytest.mark.skip(reason='needs a CUDA GPU'))
    if not config.getoption('--whole'):
        left_out = _squares([item for item in items if item.path.name in KERNELS], white=on_gpu)
        items[:] = [item for item in items if item not in left_out]
        config.hook.pytest_deselected(items=list(left_out))


KERNELS = ('test_decode.py', 'test_division.py', 'test_fill.py', 'test_flatten.py')


def _squares(items, white: bool) -> set:
    """Where a test has formats on one axis and cases on others, every other combination: the interpreter is slow, and
    a GPU's time goes into compiling.

    Every format meets half of the cases, and every case half of the formats; the white squares are the other half.
    """
    found, axes = set(), {}
    for item in items:
        params = getattr(getattr(item, 'callspec', None), 'params', {})
        if 'fmt' in params:
            case = repr([value for name, value in params.items() if name != 'fmt'])
            formats, cases = axes.setdefault(item.originalname, ({}, {}))
            row, column = formats.setdefault(params['fmt'].name, len(formats)), cases.setdefault(case, len(cases))
            if (row + column) % 2 != white:
                found.add(item)
    # what has formats on its only axis stays whole
    return {item for item in found if len(axes[item.originalname][1]) > 1}


def _device() -> str:
    import torch
    interpreting = os.environ.get('TRITON_INTERPRET', '0') == '1'
    return 'cuda' if torch.cuda.is_available() and not interpreting else 'cpu'


@pytest.fixture(scope='session')
def device() -> str:
    """Where kernels run: 'cuda', or 'cpu' under Triton's interpreter."""
    return _device()


@pytest.fixture(autouse=True)
def keep_results(request):
    """``--results``: what a test's programs wrote is more than the test asserts."""
    folder = request.config.getoption('--results')
    wrote = request.getfixturevalue('tmp_path') if folder and 'tmp_path' in request.fixturenames else None
    yield
    if wrote:
        folder.mkdir(parents=True, exist_ok=True)
        for path in wrote.glob('*.json'):
            shutil.copy(path, folder)
