"""`python -m patchscaler COMMAND`. Each command adds its own parser, and the function that it stands for."""

from __future__ import annotations

import argparse
import io
import os
import signal
import sys
from contextlib import redirect_stderr, redirect_stdout
from typing import Any, TextIO

from patchscaler import cli
from patchscaler.evaluation import bench, evaluate, sweep
from patchscaler.options import UsageError


class Outlet:
    """A standard stream to which writing never fails, since what is printed must not decide what is done.

    What its encoding lacks is written as an escape. What nobody reads any more (`| head`) is dropped.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        return self._safely(self._stream.write, text.encode(encoding, "backslashreplace").decode(encoding)) or len(text)

    def flush(self) -> None:
        self._safely(self._stream.flush)

    def _safely(self, call: Any, *arguments: str) -> Any:
        try:
            return call(*arguments)
        except OSError:
            with open(os.devnull, "wb") as nowhere:  # for what is in the stream's buffer too, which Python will flush
                os.dup2(nowhere.fileno(), self._stream.fileno())


def main(argv: list[str] | None = None) -> int:
    """Run one command. Returns 0, or 1 if something in it failed; exits with 2 on a usage error.

    Stopped by SIGINT or SIGTERM it leaves nothing half-written, and returns 130.
    """
    parser = argparse.ArgumentParser(prog="patchscaler", description="PatchScaler x4 super-resolution")
    commands = parser.add_subparsers(dest="command", required=True)
    for command in (cli, evaluate, sweep, bench):
        command.add_command(commands)
    args = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # by default it ends Python without any clean-up
    out, errors = (Outlet(stream or io.StringIO()) for stream in (sys.stdout, sys.stderr))  # None where it is closed
    with redirect_stdout(out), redirect_stderr(errors):
        try:
            return args.run(args)
        except UsageError as error:
            parser.error(str(error))
        except KeyboardInterrupt:
            return 130
        finally:
            out.flush()
            errors.flush()


if __name__ == "__main__":
    sys.exit(main())
