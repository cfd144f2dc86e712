"""The command line `xiling`, or what to install when the extra is missing."""

import sys
from collections.abc import Sequence

try:
    from xiling_async.cli.app import main
except ModuleNotFoundError as error:
    if (error.name or "").partition(".")[0] not in ("jinja2", "rich", "typer"):
        raise

    def main(arguments: Sequence[str] | None = None) -> None:
        """Say what to install."""
        sys.stderr.write("xiling: the command line needs typer, rich and jinja2: pip install 'xiling-async[cli]'\n")
        raise SystemExit(2)

except KeyboardInterrupt:  # Ctrl-C so early that nothing has begun
    raise SystemExit(130) from None


__all__ = ["main"]
