"""Which requests a server may answer: the rules that Prefect, MLflow and the exporter share.

`tests/unit/flows/local_server/test_guard.py` tests them through the guard.
"""

from __future__ import annotations

import pytest

from data_prep.core.web_guard import basic_auth, is_loopback, is_password, own_host, refusal


@pytest.mark.parametrize(
    ("address", "loopback"),
    [("127.0.0.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("box", False)],
)
def test_a_loopback_address_is_recognized(address: str, loopback: bool) -> None:
    assert is_loopback(address) is loopback


@pytest.mark.parametrize("host", ["box:9808", "box", "box:80", "10.0.0.7:9808", "[fe80::1]:9808"])
def test_a_server_for_other_machines_has_its_names_and_numbers(host: str) -> None:
    assert own_host(9808, ["Box"])(host)
    assert not own_host(9808)(host)


@pytest.mark.parametrize("host", ["evil.example:9808", "evil.example", "box.evil.example", ""])
def test_no_server_has_the_domain_name_of_another(host: str) -> None:
    assert not own_host(9808, ["box"])(host)


def test_a_request_with_two_hosts_or_without_one_is_refused() -> None:
    assert refusal("GET", {"host": ["127.0.0.1:1", "127.0.0.1:1"]}, own_host(1))
    assert refusal("GET", {}, own_host(1))


def test_the_origin_must_be_that_of_the_same_request() -> None:
    given = {"host": ["127.0.0.1:1"], "origin": ["http://localhost:1"]}
    assert refusal("GET", given, own_host(1))


def test_the_header_of_a_password_is_accepted() -> None:
    assert is_password(basic_auth("dpnet:ü:"), "dpnet:ü:")
    assert not is_password(basic_auth("dpnet:ü"), "dpnet:ü:")
