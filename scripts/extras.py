#!/usr/bin/env python3
"""Print what extras of setup.cfg ask for, one requirement a line: to install them without the package itself."""
from __future__ import annotations

import configparser
import sys
from pathlib import Path


def requirements(*names: str) -> list[str]:
    """The requirements of extras, without those that name this package's other extras."""
    config = configparser.ConfigParser(interpolation=None)
    config.read(Path(__file__).resolve().parent.parent / 'setup.cfg')
    extras = config['options.extras_require']
    return [line for name in names for line in extras[name].splitlines()
            if line and not line.startswith(f'{config["metadata"]["name"]}[')]


if __name__ == '__main__':
    print(*requirements(*sys.argv[1:]), sep='\n')
