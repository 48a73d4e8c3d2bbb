"""Neighbourhoods of addresses."""

from __future__ import annotations

import pytest

from p2p.addresses import neighbourhood


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("192.0.2.77", "192.0.2.0/24"),
        ("::ffff:192.0.2.77", "192.0.2.0/24"),
        ("2001:db8:1:2::3", "2001:db8:1::/48"),
        ("fe80::1%eth0", "fe80::/48"),
        ("", ""),
        ("somewhere.example", ""),
    ],
)
def test_neighbourhoods(host, expected):
    assert neighbourhood(host) == expected
