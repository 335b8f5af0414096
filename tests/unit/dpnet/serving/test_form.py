"""The fields of a request, from a form and from JSON."""

from __future__ import annotations

import base64
import json
import re

import pytest

from dpnet.serving.form import Form, parse_form
from dpnet.serving.limits import RequestError

MULTIPART = "multipart/form-data; boundary=cut"
BYTES = bytes(range(256)) + b"\r\n--cut-not\r\n\r\n--"


def form_of(**fields: bytes) -> bytes:
    """Return a form as browsers send it."""
    parts = b"".join(
        b'--cut\r\nContent-Disposition: form-data; name="%s"; filename="../x<b>.png"\r\n'
        b"Content-Type: image/png\r\n\r\n%s\r\n" % (name.encode(), value)
        for name, value in fields.items()
    )
    return parts + b"--cut--\r\n"


def test_a_form_keeps_every_byte_of_its_files() -> None:
    body = form_of(image=BYTES, mask=b"m", model=b"dpnet@3", format=b"same", job=b"abc-12345")
    expected = Form(BYTES, b"m", "dpnet@3", "same", "abc-12345", False)
    assert parse_form(MULTIPART, body) == expected
    assert parse_form('multipart/form-data; boundary="cut"', bytearray(body)) == expected


def test_json_has_the_same_fields_as_a_form_with_base64() -> None:
    values = {"image": base64.b64encode(BYTES).decode(), "mask": "bQ==", "model": "dpnet@3"}
    found = parse_form("application/json; charset=utf-8", json.dumps(values).encode())
    assert found == Form(BYTES, b"m", "dpnet@3", "png", "", True)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("Mask", "did you mean mask? The fields are image, mask, model, format, job."),
        ("img", "did you mean image? "),
        ("<b>zzz", "there is an unknown field: The fields are"),
        ("", "there is an unknown field: The fields are"),
    ],
)
def test_an_unknown_field_is_refused_and_the_nearest_is_named(name: str, said: str) -> None:
    fields = {"image": b"bQ==", "mask": b"bQ==", name: b"x"}
    as_json = json.dumps({key: value.decode() for key, value in fields.items()}).encode()
    for kind, body in ((MULTIPART, form_of(**fields)), ("application/json", as_json)):
        with pytest.raises(RequestError, match=re.escape(said)) as error:
            parse_form(kind, body)
        assert error.value.status == 400
        assert "<b>" not in str(error.value)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"mask": b"m"}, "image is missing"),
        ({"image": b"i", "mask": b""}, "mask is missing or empty"),
        ({"image": b"i", "mask": b"m", "format": b"tiff"}, "give png or same"),
        ({"image": b"i", "mask": b"m", "job": b"../../etc"}, "8 to 64 letters"),
        ({"image": b"i", "mask": b"m", "job": b"short"}, "8 to 64 letters"),
        ({"image": b"i", "mask": b"m", "model": b"x" * 201}, "too long"),
        ({f"f{n}": b"x" for n in range(13)}, "over 12 parts"),
    ],
)
def test_a_wrong_field_is_refused_with_what_to_do(fields: dict[str, bytes], said: str) -> None:
    with pytest.raises(RequestError, match=said) as error:
        parse_form(MULTIPART, form_of(**fields))
    assert error.value.status == 400


WHOLE = form_of(image=b"i", mask=b"m", model=b"dpnet@3")


@pytest.mark.parametrize("end", [*range(1, len(WHOLE) - 4)])
def test_a_form_that_ends_early_is_refused(end: int) -> None:
    with pytest.raises(RequestError) as error:
        parse_form(MULTIPART, WHOLE[:end])
    assert error.value.status == 400


@pytest.mark.parametrize(
    ("kind", "body", "status"),
    [
        ("text/plain", b"x", 415),
        ("", b"x", 415),
        ("multipart/form-data", WHOLE, 400),  # no boundary
        ("multipart/form-data; boundary=other", WHOLE, 400),
        ("application/json", b"{", 400),
        ("application/json", b"[" * 100_000, 400),
        ("application/json", b"[]", 400),
        ("application/json", b'{"image": 1, "mask": "bQ=="}', 400),
        ("application/json", b'{"image": "no base64!", "mask": "bQ=="}', 400),
    ],
)
def test_a_body_of_another_kind_is_refused(kind: str, body: bytes, status: int) -> None:
    with pytest.raises(RequestError) as error:
        parse_form(kind, body)
    assert error.value.status == status
