"""The command for a page and an API that fill photos: serve."""

from __future__ import annotations

import json
import socket
from argparse import Namespace

from data_prep.core.listener import open_listener
from dpnet.cli.commands.roots import Outcome, check_root


def serve(args: Namespace) -> Outcome:
    """Serve the page and the API until Ctrl-C."""
    from dpnet.serving.limits import ServeLimits
    from dpnet.serving.login import TOKEN
    from dpnet.serving.models import Models, open_source
    from dpnet.serving.server import (
        PORT,
        address_of,
        run_server,
        warn_without_model,
        why_unwritable,
    )

    defaults = ServeLimits()
    limits = ServeLimits(
        bytes=args.max_bytes or defaults.bytes,
        pixels=args.max_pixels or defaults.pixels,
        seconds=args.max_seconds or defaults.seconds,
        queue=args.queue or defaults.queue,
    )
    models = Models(open_source(args.root or None, args.model))
    if args.listener is None:
        listener = open_listener(args.host, args.port, PORT)
    else:
        listener = socket.socket(fileno=args.listener)
    with listener:
        address = address_of(listener, args.host)

        def announce() -> None:
            found = {"ok": True, "url": address.url, "login_url": address.login_url}
            lines = [f"page and API  {address.login_url}"]
            lines += [f"or            {address.by_number}"] if address.by_number else []
            lines.append("")
            if address.token and address.login_url == address.url:
                lines.append(f"Log in with the token of {TOKEN}.")
            elif address.token:
                lines.append("The address logs your browser in: do not give it to others.")
            text = "\n".join([*lines, "Ctrl-C stops the server."])
            print(json.dumps(found) if args.json else text, flush=True)

        announce()
        warn_without_model(models)
        unwritable = why_unwritable(models.source, check_root)
        run_server(models, listener, address, limits, unwritable)
    return {"ok": True, "url": address.url}, "the server has ended"
