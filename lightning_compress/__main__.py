"""`python -m lightning_compress COMMAND`; what the commands do is in `cli.py`."""

import sys

from lightning_compress.cli import main

if __name__ == "__main__":
    sys.exit(main())
