"""The ``lmdeploy-kvq`` command.

A subcommand is a module with ``add_arguments(parser)`` and ``run(args) -> exit code``, and one row in
:data:`COMMANDS`. Such a module imports torch and LMDeploy inside its functions: ``--help`` stays fast, and works where
they are missing. A user's mistake is raised as :class:`~lmdeploy_kvq.console.UserError`.
"""
from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from . import __version__
from .console import UserError


@dataclass(frozen=True)
class Command:
    """One subcommand: its name, its module in this package, and what it does in a few words."""
    name: str
    module: str
    summary: str


COMMANDS = (
    Command('doctor', 'doctor', 'check the installation: versions, GPU, hook into LMDeploy, formats, patches'),
    Command('plan', 'plan', 'how many tokens and requests fit per format, from config.json alone'),
    Command('eval', 'eval', 'what every format does to a model, and the smallest one that is safe'),
    Command('calibrate', 'calibrate', 'find scales of fp8 or transforms of narrower formats by running a model'),
)


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command."""
    parser = argparse.ArgumentParser(
        prog='lmdeploy-kvq', description="Quantized KV cache for LMDeploy's PyTorch engine.",
        epilog='To serve a model: lmdeploy serve api_server MODEL --quant-policy fp8_per_token_head')
    parser.add_argument('--version', action='version', version=f'lmdeploy-kvq {__version__}')
    commands = parser.add_subparsers(metavar='COMMAND', title='commands')
    for command in COMMANDS:
        module = importlib.import_module(f'.{command.module}', __package__)
        sub = commands.add_parser(command.name, help=command.summary, description=module.__doc__,
                                  formatter_class=argparse.RawDescriptionHelpFormatter)
        module.add_arguments(sub)
        sub.set_defaults(run=module.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: arguments, ``sys.argv[1:]`` if None.

    Returns:
        The exit code: 0 all is well, 1 the command found problems, 2 the user's mistake, 130 interrupted.
    """
    parser = build_parser()
    args = parser.parse_args(argv)
    if not hasattr(args, 'run'):
        parser.print_help(sys.stderr)
        return 2
    try:
        code = args.run(args)
        sys.stdout.flush()
        return code
    except UserError as error:
        print(f'lmdeploy-kvq: error: {error}', file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader, e.g. `head`, has seen enough; Python would complain again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


if __name__ == '__main__':
    sys.exit(main())
