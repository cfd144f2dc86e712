"""`python -m xiling_async.cli` is `xiling`."""

from xiling_async.cli import main

main()
