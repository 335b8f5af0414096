"""The socket of a server: a given port, a preferred one, or any."""

from __future__ import annotations

import pytest

from data_prep.core.errors import ConfigError
from data_prep.core.listener import open_listener


def test_a_preferred_port_is_used_if_it_is_free_and_else_any_other() -> None:
    with open_listener("127.0.0.1", 0) as probe:
        port = probe.getsockname()[1]
        with open_listener("127.0.0.1", None, port) as other:
            assert other.getsockname()[1] != port
    with open_listener("127.0.0.1", None, port) as same:
        assert same.getsockname() == ("127.0.0.1", port)


def test_a_given_port_that_is_in_use_is_an_error_with_what_to_do() -> None:
    with open_listener("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"127.0.0.1:{port}: it is in use. Choose another"):
            open_listener("127.0.0.1", port)


@pytest.mark.parametrize("host", ["none.invalid", "192.0.2.7", "a" * 300, "\x00"])
def test_an_address_that_is_not_of_this_machine_is_an_error(host: str) -> None:
    with pytest.raises(ConfigError, match="Choose another --host"):
        open_listener(host, None, 8400)
