"""Run Ray's command line without the server of Ray's client.

    python -m dpnet.training.ray.head start --head ...

Ray starts that server with every head and has no option against it (seen with 2.60).
"""

from __future__ import annotations


def main() -> None:
    """Run Ray's command line with the arguments of this process."""
    from ray.scripts import scripts

    # Without the client's dependencies, Ray starts a head without its server.
    scripts.get_ray_client_dependency_error = lambda: ImportError("the client is off")
    scripts.main()


if __name__ == "__main__":
    main()
