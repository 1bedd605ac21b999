"""Which URLs and addresses may be fetched, for URLs that nobody vouches for.

A URL is taken apart strictly, since every leniency has been an attack: what another reader may
understand differently (a backslash, white space, user names, a number in odd notation as host) is
refused, not repaired. A host is judged by the addresses that it resolves to: every one of them must
be a public one, also where an IPv4 address is wrapped in an IPv6 one. `allow` names exceptions, for
private clusters and tests: a host, an address or a network, each with or without a port.
Left out: which names are harmful; that belongs to the network's own filters.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple
from urllib.parse import quote, urlsplit

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

MAX_URL_CHARS = 8192
_PORTS = {"http": 80, "https": 443}
_FIRST_FREE_PORT = 1024
_FORBIDDEN = re.compile(r"[\x00-\x20\x7f-\x9f\\\u2028\u2029]")
_HOST = re.compile(r"[a-z0-9_]([a-z0-9_-]*[a-z0-9_])?(\.[a-z0-9_]([a-z0-9_-]*[a-z0-9_])?)*")
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*")
# Public by the registries, yet inside: Azure's and Oracle's metadata services, the notations below.
_INSIDE: tuple[Network, ...] = (
    ipaddress.ip_network("168.63.129.16/32"),
    ipaddress.ip_network("192.0.0.0/24"),
    ipaddress.ip_network("::/96"),  # IPv4-compatible addresses
    ipaddress.ip_network("fec0::/10"),  # site-local addresses
    ipaddress.ip_network("64:ff9b:1::/48"),  # translation inside a network
)
_TRANSLATED = ipaddress.ip_network("64:ff9b::/96")  # IPv4 by NAT64


class RefusedAddress(ValueError):
    """The URL or the host behind it may not be fetched; the message says why."""


class Target(NamedTuple):
    """A URL taken apart: `host` is lower case ASCII, `path` has what is sent in the request."""

    url: str
    scheme: str
    host: str
    port: int
    path: str


@dataclass(frozen=True)
class Exceptions:
    """Hosts and networks that may be fetched although they are inside."""

    hosts: frozenset[tuple[str, int | None]] = frozenset()
    networks: tuple[tuple[Network, int | None], ...] = ()

    def permits(self, target: Target, address: Address) -> bool:
        named = {(target.host, None), (target.host, target.port)} & self.hosts
        return bool(named) or any(
            address in network and port in (None, target.port) for network, port in self.networks
        )


def parse_exceptions(allow: Sequence[str]) -> Exceptions:
    """Read `allow`: `images.internal`, `10.0.0.0/8`, `127.0.0.1:8080`, `[::1]:8080`.

    Raises ValueError for what is none of these.
    """
    hosts: set[tuple[str, int | None]] = set()
    networks: list[tuple[Network, int | None]] = []
    for entry in allow:
        name, port = _split_port(entry.strip().lower())
        try:
            networks.append((ipaddress.ip_network(name), port))
        except ValueError:
            if not _HOST.fullmatch(name) or _is_number(name):
                raise ValueError(
                    f"{entry!r} is no host, address or network such as images.internal, "
                    "10.0.0.0/8 or 127.0.0.1:8080"
                ) from None
            hosts.add((name, port))
    return Exceptions(frozenset(hosts), tuple(networks))


def parse_url(url: str) -> Target:
    """Take a URL apart. Raises RefusedAddress for what is not plainly http or https."""
    if len(url) > MAX_URL_CHARS:
        raise RefusedAddress(f"the URL has {len(url):,} characters; at most {MAX_URL_CHARS:,}")
    if _FORBIDDEN.search(url):
        raise RefusedAddress("the URL holds white space, control characters or a backslash")
    scheme = url.partition("://")[0].lower()
    if scheme not in _PORTS or "://" not in url:
        raise RefusedAddress("only http:// and https:// URLs can be fetched")
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
    except ValueError as error:
        raise RefusedAddress(f"the URL cannot be read: {error}") from None
    if "@" in parts.netloc:
        raise RefusedAddress("the URL holds a user name; give it without one")
    port = _PORTS[scheme] if port is None else port
    if port not in _PORTS.values() and port < _FIRST_FREE_PORT:
        raise RefusedAddress(f"port {port}; 80, 443 and those from {_FIRST_FREE_PORT} on are used")
    path = quote(parts.path or "/", safe="/%:@!$&'()*+,;=~-._")
    if parts.query:
        path += "?" + quote(parts.query, safe="/%:@!$&'()*+,;=~-._?[]|^{}")
    return Target(url, scheme, _checked_host(host), port, path)


def check_address(target: Target, found: str, exceptions: Exceptions) -> Address:
    """The address if it may be connected to. Raises RefusedAddress, without naming it."""
    try:
        address = ipaddress.ip_address(found)
    except ValueError:  # with a zone, as link-local addresses have
        raise RefusedAddress(f"the host {target.host} has no address of the internet") from None
    if not exceptions.permits(target, address) and not is_public(address):
        raise RefusedAddress(f"the host {target.host} is not on the public internet")
    return address


def is_public(address: Address) -> bool:
    """Whether the address, and one wrapped in it, is of the public internet."""
    if isinstance(address, ipaddress.IPv6Address):
        inner = _wrapped(address)
        if inner is not None and not is_public(inner):
            return False
        if address.ipv4_mapped is not None:
            return True
    inside = any(address.version == net.version and address in net for net in _INSIDE)
    return address.is_global and not address.is_multicast and not inside


def _wrapped(address: ipaddress.IPv6Address) -> ipaddress.IPv4Address | None:
    if address in _TRANSLATED:
        return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    teredo = address.teredo[1] if address.teredo is not None else None
    return address.ipv4_mapped or address.sixtofour or teredo


def _checked_host(host: str) -> str:
    """The host in ASCII: an address in its one usual notation, or a name."""
    if ":" in host:
        try:
            if "%" in host:  # a zone: an address of this machine's own links
                raise ValueError
            return str(ipaddress.IPv6Address(host))
        except ValueError:
            raise RefusedAddress("the host is no IPv6 address") from None
    try:
        name = host.encode("idna").decode().lower() if not host.isascii() else host.lower()
    except UnicodeError:
        raise RefusedAddress("the host is no name of the internet") from None
    name = name.removesuffix(".")
    if len(name) > 253 or not _HOST.fullmatch(name):
        raise RefusedAddress("the host is no name of the internet")
    if _is_number(name):
        try:
            return str(ipaddress.IPv4Address(name))
        except ValueError:
            raise RefusedAddress(
                "the host is a number in another notation than four decimals with dots"
            ) from None
    return name


def _is_number(host: str) -> bool:
    """Whether the system would read the host as an address: its last part is a number."""
    return _NUMBER.fullmatch(host.rpartition(".")[2]) is not None


def _split_port(entry: str) -> tuple[str, int | None]:
    match = re.fullmatch(r"\[(.*)\](?::(\d{1,5}))?|([^:]*):(\d{1,5})", entry)
    if match is None:
        return entry, None
    name, port = match[1] or match[3], match[2] or match[4]
    return name, int(port) if port else None
