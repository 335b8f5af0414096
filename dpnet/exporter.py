"""`python -m dpnet.exporter` serves the metrics and files of a root."""

import sys

from dpnet.pipeline.exporter import main

if __name__ == "__main__":
    sys.exit(main())
