"""The fetcher against a real server on this machine: hostile URLs, hosts, redirects and bodies."""

import gzip
import ipaddress
import re
import socket
import ssl
import threading
import zlib
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from carillon.engine.data import fetch
from carillon.engine.data.fetch import Fetcher, FetchError, FetchLimits
from carillon.engine.data.fetch_address import RefusedAddress, parse_url

LIMITS = FetchLimits(max_bytes=100_000, total_s=60.0, idle_s=30.0)
QUICK = FetchLimits(max_bytes=100_000, total_s=1.0, idle_s=0.3)  # for what has no end


def refusal(url: str, fetcher: Fetcher | None = None, **options: Any) -> FetchError:
    with pytest.raises(FetchError) as caught:
        (fetcher or Fetcher(limits=LIMITS)).get(url, **options)
    return caught.value


@pytest.fixture
def local(web: Any) -> Fetcher:
    return Fetcher(allow=[web.address], limits=LIMITS)


@pytest.mark.parametrize(
    "host",
    [
        *("127.0.0.1", "[::1]", "169.254.169.254", "2130706433", "0x7f000001", "017700000001"),
        *("127.1", "0x7f.1", "0177.0.0.1", "127.0.0.01", "0", "0.0.0.0", "10.1.2.3", "172.16.0.1"),
        *("192.168.1.1", "100.100.100.200", "168.63.129.16", "192.0.0.192", "224.0.0.1", "0x"),
        *("255.255.255.255", "[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "[::127.0.0.1]", "[::]"),
        *("[fe80::1]", "[fe80::1%25eth0]", "[fd00:ec2::254]", "[64:ff9b::a9fe:a9fe]", "[ff02::1]"),
        *("[2002:7f00:1::]", "[2001:0:1:1:1:1:80ff:fffe]", "[fec0::1]", "localhost", "LOCALHOST."),
        *("１２７.０.０.１", "①②⑦.⓪.⓪.①", "127。0。0。1", "127.0.0.1.", "999.1.1.1", "1.2.3"),
    ],
)
def test_no_inside_host_in_any_notation(web: Any, host: str) -> None:
    error = refusal(f"http://{host}:{web.server_port}/secret")
    assert error.kind == "refused", error
    assert not error.passing
    assert "localhost" not in host or "127.0" not in str(error), "an address inside is not told"
    assert web.seen == []


@pytest.mark.parametrize(
    "url",
    [
        *("file:///etc/passwd", "FILE:///etc/passwd", "ftp://example.org/", "gopher://x/", "//x/y"),
        *("data:image/png;base64,AAAA", "/etc/passwd", "", "http:", "http://", "http:///x"),
        *("http:\\\\127.0.0.1\\", "http://example.org\\@127.0.0.1/", "http://127.0.0.1\\.org/"),
        *("http://example.org@127.0.0.1/", "http://a:b@example.org/", "http://@example.org/"),
        *("http://127.0.0.1 .org/", "http://exa\tmple.org/", "http://example.org/\r\nHost: x"),
        *("http://example.org/\0", "http://[::1/", "http://]/", "http://[x]/", "http://a..b/"),
        *("http://example.org:99999/", "http://example.org:x/", "http://example.org:22/"),
        *("http://-.org/", f"http://{'a' * 300}.org/", "http://example.org/" + "a" * 9000),
        *("http://exam%70le.org/", "http://example.org%00.org/", "http://\ud800.org/"),
    ],
)
def test_no_other_scheme_and_no_confusing_url(url: str) -> None:
    assert refusal(url).kind == "refused"


@given(st.text(max_size=40), st.sampled_from(["http://", "https://", "http://a.org/", ""]))
@settings(max_examples=300, deadline=None)
def test_any_text_is_a_plain_url_or_refused(text: str, start: str) -> None:
    """And the host that is read is the one that every other reader sees."""
    try:
        target = parse_url(start + text)
    except RefusedAddress:
        return
    assert target.path.isascii()
    assert target.path.isprintable()
    assert " " not in target.path
    assert re.fullmatch(r"[a-z0-9._-]+|[0-9a-f:.]+", target.host)
    if target.host.rpartition(".")[2].isdecimal():
        assert str(ipaddress.ip_address(target.host)) == target.host
    again = urlsplit(f"http://{target.host if ':' not in target.host else f'[{target.host}]'}/")
    assert again.hostname == target.host


def test_a_public_host_is_one_by_all_of_its_addresses(
    web: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name with an inside address among its own is refused before anything is connected to."""
    answers(monkeypatch, ["93.184.216.34", "127.0.0.1"])
    assert refusal(f"http://mixed.test:{web.server_port}/").kind == "refused"
    assert web.seen == []


def answers(monkeypatch: pytest.MonkeyPatch, *turns: list[str]) -> list[str]:
    """Make the system resolve any name to these addresses, turn by turn; returns who asked."""
    asked: list[str] = []

    def look_up(host: str, port: int, **_: object) -> list[Any]:
        asked.append(host)
        found = turns[min(len(asked), len(turns)) - 1]
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (one, port)) for one in found]

    monkeypatch.setattr(fetch.socket, "getaddrinfo", look_up)
    return asked


def test_the_address_that_was_checked_is_connected_to(
    web: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second answer would lead elsewhere; the connection never asks for it."""
    web.routes["/x"] = b"right"
    asked = answers(monkeypatch, ["127.0.0.1"], ["127.0.0.2"])
    fetcher = Fetcher(allow=["127.0.0.1/32"], limits=LIMITS)
    assert fetcher.get(f"http://name.test:{web.server_port}/x").data == b"right"
    assert asked == ["name.test"]
    assert web.seen[0][1]["Host"] == f"name.test:{web.server_port}"


def test_a_name_that_resolves_differently_the_second_time(
    web: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each hop is checked by what its name resolves to then."""
    web.routes["/x"] = redirect("/y")
    web.routes["/y"] = b"secret"
    asked = answers(monkeypatch, ["127.0.0.1"], ["127.0.0.2"])
    fetcher = Fetcher(allow=["127.0.0.1"], limits=LIMITS)
    error = refusal(f"http://name.test:{web.server_port}/x", fetcher)
    assert error.kind == "refused"
    assert asked == ["name.test", "name.test"]
    assert [path for path, _ in web.seen] == ["/x"]


def redirect(location: str, status: int = 302) -> Callable[[Any], None]:
    return lambda request: request.answer(b"", status=status, headers={"Location": location})


@pytest.mark.parametrize(
    "location",
    [
        *("http://127.0.0.2:{port}/secret", "//127.0.0.2:{port}/secret"),
        *("http://169.254.169.254/latest/", "http://[::1]:{port}/secret", "file:///etc/passwd"),
        *(
            "http://2130706434:{port}/secret",
            "ftp://127.0.0.1/",
            "http://a@127.0.0.1:{port}/secret",
        ),
        *("http:\\\\127.0.0.2:{port}\\secret", "gopher://127.0.0.1:{port}/secret"),
    ],
)
def test_redirects_to_the_inside_are_refused(web: Any, local: Fetcher, location: str) -> None:
    web.routes["/x"] = redirect(location.format(port=web.server_port))
    web.routes["/secret"] = b"secret"
    assert refusal(web.url("/x"), local).kind in ("refused", "status")
    assert "/secret" not in [path for path, _ in web.seen]


def test_redirects_are_followed_and_counted(web: Any, local: Fetcher) -> None:
    web.routes["/a"] = redirect("b?q=1", 301)
    web.routes["/b"] = redirect(web.url("/c"), 308)
    web.routes["/c"] = b"there"
    found = local.get(web.url("/a"))
    assert (found.data, found.url) == (b"there", web.url("/c"))
    web.routes["/loop"] = redirect("/loop")
    assert str(refusal(web.url("/loop"), local)) == "more than 5 redirects"
    web.routes["/nowhere"] = lambda request: request.answer(b"", status=302)
    assert refusal(web.url("/nowhere"), local).kind == "broken"


def test_exceptions_hold_for_what_they_name(web: Any) -> None:
    web.routes["/x"] = b"x"
    port = web.server_port
    for allow in ([f"127.0.0.1:{port}"], ["127.0.0.0/8"], ["127.0.0.1"], ["[::1]:9", "127.0.0.1"]):
        assert Fetcher(allow=allow, limits=LIMITS).get(web.url("/x")).data == b"x"
    for allow in ([f"127.0.0.1:{port + 1}"], ["10.0.0.0/8"], ["localhost"], ["127.0.0.2"]):
        assert refusal(web.url("/x"), Fetcher(allow=allow, limits=LIMITS)).kind == "refused"
    local = Fetcher(allow=["localhost"], limits=LIMITS)
    assert local.get(f"http://localhost:{port}/x").data == b"x"
    for entry in ("2130706433", "a b", "", "http://x", "127.0.0.1/33", "0x7f.1"):
        with pytest.raises(ValueError, match="is no host, address or network"):
            Fetcher(allow=[entry])


def write(*pieces: bytes) -> Callable[[Any], None]:
    """A route that sends these bytes as they are, and closes."""

    def route(request: Any) -> None:
        for piece in pieces:
            request.wfile.write(piece)

    return route


def endless(head: bytes, piece: bytes, pause_s: float = 0.0) -> Callable[[Any], None]:
    def route(request: Any) -> None:
        request.wfile.write(head)
        while not request.server.stopped.wait(pause_s):
            request.wfile.write(piece)

    return route


OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"
NO_END = {
    "body": (OK + b"\r\n", b"x" * 10_000, 0, "too large"),
    "chunks": (CHUNKED, b"2710\r\n" + b"x" * 10_000 + b"\r\n", 0, "too large"),
    "chunk extensions": (CHUNKED, b"1;" + b"a" * 60_000 + b"\r\nx\r\n", 0, "too large"),
    "continues": (
        b"",
        b"HTTP/1.1 100 Continue\r\nX: " + b"y" * 9_000 + b"\r\n\r\n",
        0,
        "too large",
    ),
    "a header": (OK + b"X: ", b"y" * 10_000, 0, "broken"),
    "headers": (OK, b"X: y\r\n", 0, "broken"),
    "trickled body": (OK + b"\r\n", b"x", 0.05, "slow"),
    "trickled header": (OK + b"X: ", b"y", 0.05, "slow"),
    "trickled chunk size": (CHUNKED, b"0", 0.05, "slow"),
    "trickled trailer": (CHUNKED + b"0\r\n", b"X: y\r\n", 0.05, "slow"),
    "silence": (b"", b"", 0.05, "slow"),
    "silence in the body": (OK + b"Content-Length: 9\r\n\r\nx", b"", 0.05, "slow"),
}


@pytest.mark.parametrize("name", NO_END)
def test_what_never_ends_is_cut(web: Any, local: Fetcher, name: str) -> None:
    head, piece, pause_s, kind = NO_END[name]
    web.routes["/x"] = endless(head, piece, pause_s)
    error = refusal(web.url("/x"), local, limits=QUICK if kind == "slow" else LIMITS)
    assert error.kind == kind, error
    assert error.passing == (kind in ("slow", "broken"))


def test_the_cap_is_exact_and_an_announced_length_is_refused_at_once(
    web: Any, local: Fetcher
) -> None:
    web.routes["/fits"] = b"x" * 100_000
    assert len(local.get(web.url("/fits")).data) == 100_000
    web.routes["/over"] = b"x" * 100_001
    assert str(refusal(web.url("/over"), local)) == "more than 100,000 bytes"
    web.routes["/huge"] = write(OK + b"Content-Length: 99999999999\r\n\r\n")
    assert refusal(web.url("/huge"), local).kind == "too large"


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "x-gzip"])
def test_compressed_bodies_expand_up_to_the_cap(web: Any, local: Fetcher, encoding: str) -> None:
    pack = zlib.compress if encoding == "deflate" else gzip.compress
    headers = {"Content-Encoding": encoding}
    bodies = {"/small": b"abc" * 9000, "/bomb": bytes(20_000_000)}
    for path, data in bodies.items():
        packed = pack(data)
        web.routes[path] = lambda request, packed=packed: request.answer(packed, headers=headers)
    assert local.get(web.url("/small")).data == bodies["/small"]
    assert refusal(web.url("/bomb"), local).kind == "too large"
    cut = pack(bodies["/small"])[:-9]
    web.routes["/cut"] = lambda request: request.answer(cut, headers=headers)
    assert "ended too early" in str(refusal(web.url("/cut"), local))
    web.routes["/bad"] = lambda request: request.answer(b"\x1f\x8bnot", headers=headers)
    assert "damaged" in str(refusal(web.url("/bad"), local))


@pytest.mark.parametrize("encoding", ["br", "gzip, gzip", "zstd"])
def test_other_encodings_are_refused(web: Any, local: Fetcher, encoding: str) -> None:
    headers = {"Content-Encoding": encoding}
    web.routes["/x"] = lambda request: request.answer(b"x", headers=headers)
    assert refusal(web.url("/x"), local).kind == "type"


@pytest.mark.parametrize(
    "sent",
    [
        *(OK + b"Content-Length: 9\r\n\r\nxyz", CHUNKED + b"9\r\nxyz", CHUNKED + b"zz\r\n", b""),
        *(b"SSH-2.0-x\r\n", b"HTTP/1.1 abc\r\n\r\n", b"\x15\x03\x01\0\x02", CHUNKED + b"-5\r\n"),
    ],
)
def test_broken_answers_are_told(web: Any, local: Fetcher, sent: bytes) -> None:
    web.routes["/x"] = write(sent)
    error = refusal(web.url("/x"), local)
    assert (error.kind, error.passing) == ("broken", True), error


@pytest.mark.parametrize(("status", "passing"), [(404, False), (403, False), (503, True)])
def test_statuses(web: Any, local: Fetcher, status: int, passing: bool) -> None:
    headers = {"Retry-After": "7"}
    web.routes["/x"] = lambda request: request.answer(b"no", status=status, headers=headers)
    error = refusal(web.url("/x"), local)
    assert (error.kind, error.status, error.passing) == ("status", status, passing)
    assert error.retry_after_s == 7


def test_content_types_where_they_matter(web: Any, local: Fetcher) -> None:
    web.routes["/x"] = lambda request: request.answer(b"x", headers={"Content-Type": "Text/HTML;x"})
    assert str(refusal(web.url("/x"), local, content_types=["image/", "video/"])) == (
        "the content type is text/html; image/, video/ is taken"
    )
    assert local.get(web.url("/x"), content_types=["text/"]).data == b"x"


def test_byte_ranges(web: Any, local: Fetcher) -> None:
    web.routes["/x"] = b"0123456789"
    assert local.get(web.url("/x"), byte_range=(2, 5)).data == b"234"
    web.routes["/whole"] = lambda request: request.answer(b"0123456789")
    assert "no byte ranges" in str(refusal(web.url("/whole"), local, byte_range=(2, 5)))
    found = local.head(web.url("/x"))
    assert (found.headers["content-length"], found.data) == ("10", b"")


def test_what_is_sent(web: Any, local: Fetcher) -> None:
    web.routes["/größe x.jpg".replace(" ", "%20").replace("größe", "gr%C3%B6%C3%9Fe")] = b"x"
    assert local.get(web.url("/größe%20x.jpg?a=b&c=ä")).data == b"x"
    path, headers = web.seen[0]
    assert path == "/gr%C3%B6%C3%9Fe%20x.jpg?a=b&c=%C3%A4"
    assert headers["User-Agent"].startswith("carillon-engine/")
    assert headers["Accept-Encoding"] == "identity"


def test_a_host_that_is_not_there() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))  # bound, but nobody listens
        port = free.getsockname()[1]
        error = refusal(f"http://127.0.0.1:{port}/", Fetcher(allow=["127.0.0.1"], limits=LIMITS))
    assert (error.kind, error.passing) == ("unreachable", True)


def test_a_look_up_that_hangs_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    stop = threading.Event()

    def look_up(*_: object, **__: object) -> list[Any]:
        stop.wait(30)
        return []

    monkeypatch.setattr(fetch.socket, "getaddrinfo", look_up)
    error = refusal("http://slow.test/", Fetcher(limits=QUICK))
    stop.set()
    assert (error.kind, error.passing) == ("unreachable", True)


def test_names_of_certificates_are_checked(
    web: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The connection goes to a pinned address, yet a certificate must be of the URL's name."""
    certificate = self_signed(tmp_path, "good.test")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    web.socket = context.wrap_socket(web.socket, server_side=True)
    web.routes["/x"] = b"x"
    answers(monkeypatch, ["127.0.0.1"])
    fetcher = Fetcher(allow=["127.0.0.1"], limits=LIMITS)
    assert "self-signed" in str(refusal(f"https://good.test:{web.server_port}/x", fetcher))
    trusting = ssl.create_default_context(cafile=str(certificate))
    monkeypatch.setattr(fetch, "_context", lambda: trusting)
    assert fetcher.get(f"https://good.test:{web.server_port}/x").data == b"x"
    error = refusal(f"https://bad.test:{web.server_port}/x", fetcher)
    assert error.kind == "refused"
    assert "mismatch" in str(error)


def self_signed(folder: Path, name: str) -> Path:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    now = datetime.now(UTC)
    builder = x509.CertificateBuilder(subject, subject, key.public_key(), 1)
    builder = builder.not_valid_before(now - timedelta(days=1))
    builder = builder.not_valid_after(now + timedelta(days=1))
    alternatives = x509.SubjectAlternativeName([x509.DNSName(name)])
    certificate = builder.add_extension(alternatives, critical=False).sign(key, hashes.SHA256())
    path = folder / "server.pem"
    pem = serialization.Encoding.PEM
    form = serialization.PrivateFormat.PKCS8
    private = key.private_bytes(pem, form, serialization.NoEncryption())
    path.write_bytes(private + certificate.public_bytes(pem))
    return path
