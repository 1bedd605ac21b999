import io
import tarfile

import pytest

from carillon.engine.data.tar_members import TarError, iter_members


def archive(form: int, names: list[str]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
        for number, name in enumerate(names):
            info = tarfile.TarInfo(name)
            info.size = number * 300
            tar.addfile(info, io.BytesIO(bytes([number]) * info.size))
    return buffer.getvalue()


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_agrees_with_tarfile(form: int) -> None:
    names = ["a.jpg", "d/" * 60 + "b.jpg", "é漢.json" if form != tarfile.USTAR_FORMAT else "c.json"]
    data = archive(form, names)
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        members = tar.getmembers()
    expected = [(m.name, "file", m.offset_data, m.size, m.offset) for m in members]
    assert [tuple(m) for m in iter_members(io.BytesIO(data), len(data))] == expected


def with_size_field(field: bytes) -> bytes:
    header = bytearray(archive(tarfile.USTAR_FORMAT, ["a"])[:512])
    header[124:136] = field
    header[148:156] = b" " * 8
    header[148:156] = f"{sum(header):06o}\0 ".encode()
    return bytes(header) + bytes(1024)


@pytest.mark.parametrize("field", [b"\xff" * 12, b"-0000000001\0", b"zzzzzzzzzzz\0"])
def test_a_size_that_tarfile_would_loop_on_is_refused(field: bytes) -> None:
    data = with_size_field(field)
    with pytest.raises(TarError, match="cannot be read"):
        list(iter_members(io.BytesIO(data), len(data)))


@pytest.mark.parametrize("field", [b"\x80" + b"\x7f" * 11, b"77777777777\0"])
def test_a_size_past_the_end_is_refused(field: bytes) -> None:
    data = with_size_field(field)
    with pytest.raises(TarError, match="truncated"):
        list(iter_members(io.BytesIO(data), len(data)))


def test_a_damaged_pax_header_is_refused() -> None:
    data = archive(tarfile.PAX_FORMAT, ["é.json"])
    at = data.index(b" path=")
    broken = data[: at - 2] + b"00" + data[at:]
    with pytest.raises(TarError, match="pax header"):
        list(iter_members(io.BytesIO(broken), len(broken)))


def names_in(data: bytes) -> list[str]:
    return [member.name for member in iter_members(io.BytesIO(data), len(data))]


def unpadded() -> bytes:
    return archive(tarfile.USTAR_FORMAT, ["a", "b", "c"])[:3072]


@pytest.mark.parametrize("num_blocks", [1, 2, 3, 20, 21])
def test_the_end_marks_of_usual_writers_are_taken(num_blocks: int) -> None:
    data = unpadded() + bytes(num_blocks * 512)
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        assert names_in(data) == tar.getnames() == ["a", "b", "c"]


def test_an_archive_without_an_end_mark_is_truncated() -> None:
    with pytest.raises(TarError, match=r"^truncated: it ends at byte 3,072 without an end mark"):
        names_in(unpadded())


@pytest.mark.parametrize("end", [1536, 3072])
def test_zeros_from_some_byte_on_are_no_end_mark(end: int) -> None:
    whole = unpadded() + bytes(3 << 20)
    data = whole[:end] + bytes(len(whole) - end)
    with pytest.raises(TarError, match=rf"zeros: it ends at byte {end:,}, [\d,]+ bytes of zeros"):
        names_in(data)


@pytest.mark.parametrize("num_blocks", [1, 2])
def test_zeros_in_the_middle_are_damage(num_blocks: int) -> None:
    whole = unpadded() + bytes(1024)
    data = whole[:512] + bytes(num_blocks * 512) + whole[512 + num_blocks * 512 :]
    with pytest.raises(TarError, match=r"^damaged: [\d,]+ bytes of zeros at byte 512, then other"):
        names_in(data)
