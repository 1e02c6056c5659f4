"""`python -m fnreg` is the command line."""

import sys

from fnreg.cli import main

if __name__ == "__main__":
    sys.exit(main())
