"""What a wrong RAY_ADDRESS is told; nothing is connected."""

from __future__ import annotations

import socket

import pytest

from pocl_ray import session
from pocl_ray.errors import ResourceError


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("http://head:8265", "a dashboard's address, .* use `pocl-ray submit --address"),
        ("ray://head:10001", "the address of a Ray client"),
        ("head", "not of the form HOST:PORT"),
        ("head:http", "not of the form HOST:PORT"),
        ("127.0.0.1:99999", "no Ray cluster answers there"),
    ],
)
def test_an_address_of_another_form_is_told_what_it_should_be(address: str, words: str) -> None:
    with pytest.raises(ResourceError, match=words):
        session.check_address(address)


def test_an_address_where_nobody_listens_is_told_in_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "REACH_S", 0.0)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    with pytest.raises(ResourceError, match=rf"RAY_ADDRESS 127.0.0.1:{port}: no Ray cluster answers there"):
        session.check_address(f"127.0.0.1:{port}")


def test_an_address_where_somebody_listens_is_left_to_ray() -> None:
    session.check_address("auto")
    with socket.create_server(("127.0.0.1", 0)) as server:
        session.check_address(f"127.0.0.1:{server.getsockname()[1]}")
