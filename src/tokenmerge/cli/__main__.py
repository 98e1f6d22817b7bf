"""`python -m tokenmerge.cli`, as torchrun starts it."""

import sys

from tokenmerge.cli import main

if __name__ == "__main__":
    sys.exit(main())
