"""Addresses in text: the multiaddrs that this network understands.

``/ip4/ADDRESS/tcp/PORT``, likewise ``ip6``, ``dns``, ``dns4``, ``dns6``, each with or without
``/p2p/PEER`` at the end. Pure.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from dataclasses import dataclass

HOST_KINDS = ("ip4", "ip6", "dns", "dns4", "dns6")
MAX_ADDRESS_CHARACTERS = 512


class BadAddress(ValueError):
    """A text is no address of a kind that this network understands."""


@dataclass(frozen=True, slots=True)
class Address:
    """Where to dial or listen.

    Attributes:
        kind: one of `HOST_KINDS`.
        host: an address or a name, as the kind says.
        peer: who should be there; none where it is not said.
    """

    kind: str
    host: str
    port: int
    peer: str | None = None

    def __str__(self) -> str:
        return f"/{self.kind}/{self.host}/tcp/{self.port}"


def parse_address(text: str) -> Address:
    """Reads an address.

    Raises:
        BadAddress: it is none; the text says what was expected.
    """
    parts = text.split("/") if len(text) <= MAX_ADDRESS_CHARACTERS else []
    if len(parts) not in (5, 7) or parts[0] or parts[1] not in HOST_KINDS or parts[3] != "tcp":
        raise BadAddress(
            f"{text[:128]!r} is no address; expected something like /ip4/192.0.2.7/tcp/4001"
        )
    kind, host = parts[1], parts[2]
    if not parts[4].isascii() or not parts[4].isdigit() or not 0 <= int(parts[4][:6]) <= 65535:
        raise BadAddress(f"{text[:128]!r} has no port between 0 and 65535")
    try:
        if kind == "ip4":
            host = str(ipaddress.IPv4Address(host))
        elif kind == "ip6":
            host = str(ipaddress.IPv6Address(host))
        elif not host or not host.isascii() or len(host) > 253:
            raise ValueError
    except ValueError:
        raise BadAddress(f"{text[:128]!r} has no valid {kind} host") from None
    peer = None
    if len(parts) == 7:
        if parts[5] != "p2p" or not parts[6]:
            raise BadAddress(f"{text[:128]!r} should end in /p2p/ and a peer id")
        peer = parts[6]
    return Address(kind, host, int(parts[4]), peer)


def keep_dialable(texts: Iterable[str], limit: int) -> tuple[str, ...]:
    """Those of a peer's claimed addresses that can be dialled, each once, at most so many."""
    kept: dict[str, None] = {}
    for text in texts:
        try:
            address = parse_address(text)
        except BadAddress:
            continue
        if address.port and address.host not in ("0.0.0.0", "::"):
            kept[str(address)] = None
            if len(kept) >= limit:
                break
    return tuple(kept)


def neighbourhood(host: str) -> str:
    """The part of the address space that a host is in: its /24 of IPv4, its /48 of IPv6.

    That is about what one customer of an access provider gets at most (RFC 6177, section 2), and so
    what one peer can fill with identities. Hosts without an address are one neighbourhood.
    """
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return ""
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    prefix = 24 if address.version == 4 else 48
    return str(ipaddress.ip_network((address, prefix), strict=False))
