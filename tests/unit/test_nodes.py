"""Which network card gloo is to use."""

import os

import pytest

from cluster.nodes import choose_interface


@pytest.fixture(autouse=True)
def unset(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "set so that it is put back")
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")


def test_the_card_that_has_the_address():
    choose_interface("127.0.0.1")
    assert os.environ["GLOO_SOCKET_IFNAME"].startswith("lo")


def test_none_has_it_so_gloo_chooses():
    choose_interface("203.0.113.7")  # of the documentation's range
    assert "GLOO_SOCKET_IFNAME" not in os.environ


def test_what_the_user_set_stays(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth7")
    choose_interface("127.0.0.1")
    assert os.environ["GLOO_SOCKET_IFNAME"] == "eth7"
