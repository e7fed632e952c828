"""`python -m imprint_pl`."""

import sys

from imprint_pl.cli import main

if __name__ == "__main__":
    sys.exit(main())
