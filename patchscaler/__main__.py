"""``python -m patchscaler COMMAND``. Each command adds its own parser, and the function that it stands for."""

from __future__ import annotations

import argparse
import signal
import sys

from patchscaler import cli
from patchscaler.evaluation import bench, benchmark, sweep
from patchscaler.options import UsageError


def main(argv: list[str] | None = None) -> int:
    """Run one command. Returns 0, or 1 if something in it failed; exits with 2 on a usage error.

    Stopped by SIGINT or SIGTERM it leaves nothing half-written, and returns 130.
    """
    parser = argparse.ArgumentParser(prog="patchscaler", description="PatchScaler x4 super-resolution")
    commands = parser.add_subparsers(dest="command", required=True)
    for command in (cli, benchmark, sweep, bench):
        command.add_command(commands)
    args = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # by default it ends Python without any clean-up
    try:
        return args.run(args)
    except UsageError as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
