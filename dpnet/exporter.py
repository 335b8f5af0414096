"""The command `python -m dpnet.exporter`, which serves the metrics and reports of a root."""

import sys

from dpnet.pipeline.exporter import main

if __name__ == "__main__":
    sys.exit(main())
