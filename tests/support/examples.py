"""The examples that hypothesis tries: others in each run, and a failing one can be repeated.

A failure prints the example and a line `@reproduce_failure(...)`, which repeats it on any machine.
CI tries more examples than `make test` on a developer's machine. `--hypothesis-seed=N` or
`--hypothesis-profile=ci` choose others.
"""

import os

from hypothesis import settings

COMMON = {"deadline": None, "derandomize": False, "database": None, "print_blob": True}


def use_profile() -> None:
    """Choose the number of examples: 30, in CI 50."""
    settings.register_profile("default", max_examples=30, **COMMON)
    settings.register_profile("ci", max_examples=50, **COMMON)
    settings.load_profile("ci" if os.environ.get("CI") == "true" else "default")
