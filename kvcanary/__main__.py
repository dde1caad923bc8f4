"""`python -m kvcanary`."""

import sys

from kvcanary.cli import main

if __name__ == "__main__":
    sys.exit(main())
