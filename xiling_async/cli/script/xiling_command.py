"""The script `xiling`: a module of its own, so that Ctrl-C while the library is being imported shows no traceback."""

import sys
from importlib import import_module


def main() -> None:
    """Run the command line. Ctrl-C before it has begun is exit code 130, like later."""
    try:
        command = import_module("xiling_async.cli").main
    except KeyboardInterrupt:
        sys.exit(130)
    command()
