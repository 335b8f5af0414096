"""Options of the commands for servers: deploy, up, serve."""

from __future__ import annotations

import argparse

from dpnet.cli.arguments.options import (
    Parsers,
    add_command,
    add_root,
    add_set,
    port,
    positive,
    whole,
)


def add_deploy(parsers: Parsers) -> None:
    """Add `dpnet deploy`."""
    parser = add_command(
        parsers,
        "deploy",
        "servers.deploy",
        "create or update the deployments, schedules and alerts on the Prefect server",
        "dpnet deploy deploy.yaml --set parameters.images.source=/data/photos",
        "Everything that is up to date stays as it is. The server is that of PREFECT_API_URL, else"
        " that of `dpnet up`. If DPNET_ALERT_URL is set (an Apprise URL: a webhook, Slack or"
        " mailto://), alerts are sent to it.",
    )
    parser.add_argument(
        "file",
        metavar="FILE",
        nargs="?",
        help="YAML file that lists what to deploy (default: the demo)",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="show what would change, and change nothing"
    )
    add_root(parser, "root of the `dpnet up` to use")
    add_set(parser, "parameters.train.steps=100", "the file")


def add_up(parsers: Parsers) -> None:
    """Add `dpnet up`."""
    parser = add_command(
        parsers,
        "up",
        "servers.up",
        "start a local Prefect server with its UI, a worker and MLflow, until Ctrl-C",
        "dpnet up --root /data/dpnet --ray",
        "Runs and deployments are kept for the next time. Everything listens on 127.0.0.1 only. If"
        " it is running for this root already, the command prints the addresses. If"
        " PREFECT_API_AUTH_STRING=user:password is set in the environment, Prefect asks for that"
        " password.",
    )
    parser.set_defaults(
        stopped="stopped everything that `dpnet up` had started: Prefect, its worker with the runs"
        " in it, MLflow, the exporter and, if asked for, Ray and the page. Nothing stored is lost."
        " The same command starts them again, and Retry in Prefect's UI resumes a run."
    )
    add_root(parser, "folder or s3:// URI where everything is stored")
    parser.add_argument(
        "--port",
        type=port,
        metavar="N",
        help="port of the Prefect server (default: 4200, else any free port)",
    )
    parser.add_argument(
        "--database",
        metavar="URL",
        help="database of the Prefect server, postgresql+asyncpg://USER:PASSWORD@HOST/NAME"
        " (default: PREFECT_SERVER_DATABASE_CONNECTION_URL, which keeps the password out of the"
        " list of processes, else SQLite in the root's folder)",
    )
    parser.add_argument(
        "--ray", action="store_true", help="also start a Ray cluster of this machine, for ray-job"
    )
    parser.add_argument(
        "--serve", action="store_true", help="also start the page of `dpnet serve`, to try models"
    )


def add_serve(parsers: Parsers) -> None:
    """Add `dpnet serve`."""
    parser = add_command(
        parsers,
        "serve",
        "serve.serve",
        "serve a page and an HTTP API that fill photos, until Ctrl-C",
        "dpnet serve --root ./dpnet-demo",
        "Open the printed address in a browser, paint a hole over a photo, and see it filled. The"
        " champion answers, and the next one after a promotion, without a restart. The server"
        " listens on 127.0.0.1 only, unless --host says otherwise; then every request needs the"
        " token, which the printed address has. /docs lists the API.",
    )
    parser.set_defaults(stopped="stopped serving. The same command starts it again.")
    add_root(parser, "where models are searched and votes are kept")
    parser.add_argument(
        "--model",
        default="",
        help="folder of a run or of an exported model, models:/NAME@champion or"
        " models:/NAME/VERSION (default: the root's champion)",
    )
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen on; for other machines 0.0.0.0 (default: 127.0.0.1)",
    )
    parser.add_argument(
        "--port", type=port, metavar="N", help="port (default: 8400, else any free port)"
    )
    parser.add_argument(
        "--max-bytes", type=whole, metavar="N", help="most bytes of an upload (default: 10^8)"
    )
    parser.add_argument(
        "--max-pixels",
        type=whole,
        metavar="N",
        help="most pixels of a photo (default: 4 * 10^7); more pixels need more memory",
    )
    parser.add_argument(
        "--max-seconds",
        type=positive,
        metavar="S",
        help="longest time of filling one photo, in seconds (default: 600)",
    )
    parser.add_argument(
        "--queue",
        type=whole,
        metavar="N",
        help="most requests at the same time; further ones are asked to wait (default: 32)",
    )
    # `dpnet up` opens the socket itself, so that no other program can take its port.
    parser.add_argument("--listener", type=int, metavar="FD", help=argparse.SUPPRESS)
