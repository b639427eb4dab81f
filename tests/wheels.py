"""Older LMDeploys to test against: the Python of their wheels, unpacked one beside another in ``.lmdeploy/``.

    python tests/wheels.py      fetches them all; the folder can then be carried to a machine without a package index

Wheels are looked for in the folders of ``LMDEPLOY_WHEELS``, else pip downloads them (100 MB each, once).
"""
from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / '.lmdeploy'
OLDER = ('0.17.0', '0.16.0')


class NoWheel(Exception):
    """A wheel is not here, and pip cannot get it; says why."""


def unpacked(version: str) -> Path:
    """Folder to put first on the path: the package without its compiled libraries, and its metadata.

    Raises:
        NoWheel: it is not there and cannot be downloaded.
    """
    target = FOLDER / version
    if target.is_dir():
        return target
    FOLDER.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=FOLDER) as work:
        folders = [Path(folder) for folder in os.environ.get('LMDEPLOY_WHEELS', '').split(os.pathsep) if folder]
        wheels = [wheel for folder in folders for wheel in folder.glob(f'lmdeploy-{version}-*.whl')]
        wheel = wheels[0] if wheels else _download(version, work)
        with zipfile.ZipFile(wheel) as archive:
            # TurboMind's library is 330 MB, and of one Python; nothing here runs TurboMind
            archive.extractall(Path(work, 'new'), [name for name in archive.namelist() if '/lib/' not in name])
        try:
            Path(work, 'new').rename(target)
        except OSError:  # another process was first
            if not target.is_dir():
                raise
    return target


def _download(version: str, folder: str) -> Path:
    command = [sys.executable, '-m', 'pip', 'download', '--no-deps', '--disable-pip-version-check', '--retries', '1',
               '--only-binary', ':all:', '--dest', folder, f'lmdeploy=={version}']
    try:
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=300)
    except subprocess.TimeoutExpired:
        raise NoWheel(f'lmdeploy {version}: pip download took more than 300 s') from None
    if done.returncode:
        raise NoWheel(f'lmdeploy {version} cannot be downloaded: {(done.stderr.strip().splitlines() or ["?"])[-1]}')
    return next(Path(folder).glob('*.whl'))


if __name__ == '__main__':
    for each in OLDER:
        print(unpacked(each))
