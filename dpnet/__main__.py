"""`python -m dpnet` is the command `dpnet`."""

import sys

from dpnet.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
