"""Shared setup: kernels run on the GPU where there is one, else on the CPU in Triton's interpreter."""
import os

import pytest

GPU = os.path.exists('/dev/nvidia0') and os.environ.get('CUDA_VISIBLE_DEVICES') != ''
if not GPU:
    os.environ['TRITON_INTERPRET'] = '1'  # read when triton is imported, which torch does; so before either


def pytest_configure(config):
    """Declare the ``gpu`` marker; silence what Triton's interpreter does on every loop over device values."""
    config.addinivalue_line('markers', 'gpu: needs a CUDA GPU; skipped elsewhere')
    config.addinivalue_line('markers', 'covers(*ids): rows of tests/rows.py that the test is evidence for')
    config.addinivalue_line('filterwarnings', 'ignore:Conversion of an array with ndim:DeprecationWarning:triton')


def pytest_collection_modifyitems(items):
    """Skip tests marked ``gpu`` where kernels do not run on a GPU."""
    if _device() != 'cuda':
        for item in items:
            if item.get_closest_marker('gpu'):
                item.add_marker(pytest.mark.skip(reason='needs a CUDA GPU'))


def _device() -> str:
    import torch
    interpreting = os.environ.get('TRITON_INTERPRET', '0') == '1'
    return 'cuda' if torch.cuda.is_available() and not interpreting else 'cpu'


@pytest.fixture(scope='session')
def device() -> str:
    """Where kernels run: 'cuda', or 'cpu' under Triton's interpreter."""
    return _device()
