"""Open the socket of a server."""

from __future__ import annotations

import errno
import socket

from data_prep.core.errors import ConfigError


def open_listener(host: str, port: int | None, preferred: int = 0) -> socket.socket:
    """Return a socket that listens.

    Args:
        host: the address or the name to listen on.
        port: 0 to 65535; 0 means any free port, None means `preferred`, else any free port.
        preferred: the port to try first.

    Raises:
        ConfigError: the address or the port cannot be used.
    """
    try:
        family = socket.getaddrinfo(host, port or preferred, type=socket.SOCK_STREAM)[0][0]
        try:
            return socket.create_server((host, preferred if port is None else port), family=family)
        except OSError:
            if port is not None:
                raise
            return socket.create_server((host, 0), family=family)
    except (OSError, OverflowError, UnicodeError) as error:
        used = isinstance(error, OSError) and error.errno == errno.EADDRINUSE
        reason = "it is in use" if used else getattr(error, "strerror", None) or error
        where = f"{host}:{'any port' if port is None else port}"
        raise ConfigError(
            f"the server cannot listen on {where}: {reason}. Choose another --host or --port."
        ) from None
