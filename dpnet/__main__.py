"""`python -m dpnet` is the command `dpnet`."""

import sys

from dpnet.cli import main

if __name__ == "__main__":
    sys.exit(main())
