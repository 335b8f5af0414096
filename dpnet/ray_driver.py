"""`python -m dpnet.ray_driver` is the job that the launcher `ray-job` submits."""

import sys

from dpnet.training.ray.job_driver import main

if __name__ == "__main__":
    sys.exit(main())
