"""One thread for each test process: on small tensors more threads only wait for one another."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
