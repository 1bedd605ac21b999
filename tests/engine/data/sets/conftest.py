import gzip
import io
import json
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest

from carillon.engine.data.samples import RawSample
from carillon.engine.data.sets.npm import Package
from carillon.engine.data.sets.sound import encode_flac
from carillon.engine.data.shards import Dataset

WriteDeb = Callable[..., Path]


def tar_of(files: Mapping[str, bytes], links: Mapping[str, str] | None = None) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(f"./{name}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        for name, target in (links or {}).items():
            info = tarfile.TarInfo(f"./{name}")
            info.type, info.linkname = tarfile.SYMTYPE, target
            tar.addfile(info)
    return buffer.getvalue()


def deb_of(name: str, version: str, data: bytes) -> bytes:
    """A binary package, as deb(5) has it: an ar archive of a version and two tars."""
    control = f"Package: {name}\nVersion: {version}\nArchitecture: all\n".encode()
    parts = {
        "debian-binary": b"2.0\n",
        "control.tar.gz": gzip.compress(tar_of({"control": control}), mtime=0),
        "data.tar.gz": gzip.compress(data, mtime=0),
    }
    archive = b"!<arch>\n"
    for part, content in parts.items():
        header = f"{part:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(content):<10}`\n"
        archive += header.encode() + content + b"\n" * (len(content) % 2)
    return archive


@pytest.fixture
def write_deb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> WriteDeb:
    """Writes a package's file with the files given, into a folder of the test; a cache is there."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "debs"
    folder.mkdir()

    def write(
        name: str,
        files: Mapping[str, bytes],
        version: str = "1.0-1",
        links: Mapping[str, str] | None = None,
    ) -> Path:
        path = folder / f"{name}_{version.replace(':', '%3a')}_all.deb"
        path.write_bytes(deb_of(name, version, tar_of(files, links)))
        return folder

    return write


@pytest.fixture
def write_npm(tmp_path: Path) -> Callable[[Package, Mapping[str, object]], None]:
    """Writes a package's tarball with JSON files into the folder of write_deb."""

    def write(package: Package, files: Mapping[str, object]) -> None:
        encoded = {f"package/{name}": json.dumps(data).encode() for name, data in files.items()}
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as tar:
            for name, data in encoded.items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        path = tmp_path / "debs" / package.file
        path.write_bytes(gzip.compress(buffer.getvalue(), mtime=0))

    return write


# A few emoji with their names as CLDR has them. By hash the circle, the red heart, the thumb, the
# umbrella and the fox are held out; the fox has the dog's names, as words are shared in CLDR.
NAMED = {
    "🔴": {"en": "red circle", "fr": "disque rouge", "ar": "دائرة حمراء", "de": "roter Punkt"},
    "❤": {"en": "red heart", "fr": "cœur rouge", "ar": "قلب أحمر", "de": "rotes Herz"},
    "💜": {"en": "purple heart", "fr": "cœur violet", "ar": "قلب بنفسجي", "de": "lila Herz"},
    "👍": {"en": "thumbs up", "fr": "pouce vers le haut", "ar": "إبهام لأعلى", "de": "Daumen hoch"},
    "🐈": {"en": "cat", "fr": "chat", "ar": "قطة", "de": "Katze"},
    "🐕": {"en": "dog", "fr": "chien", "ar": "كلب", "de": "Hund"},
    "🦊": {"en": "dog", "fr": "chien", "ar": "كلب", "de": "Hund"},
    "🐟": {"en": "fish", "fr": "poisson", "ar": "سمكة", "de": "Fisch"},
    "🌳": {"en": "deciduous tree", "fr": "arbre", "ar": "شجرة", "de": "Laubbaum"},
    "🚲": {"en": "bicycle", "fr": "vélo", "ar": "دراجة", "de": "Fahrrad"},
    "🏠": {"en": "house", "fr": "maison", "ar": "منزل", "de": "Haus"},
    "☂": {"en": "umbrella", "fr": "parapluie", "ar": "مظلة", "de": "Regenschirm"},
    "🍎": {"en": "red apple", "fr": "pomme rouge", "ar": "تفاحة حمراء", "de": "roter Apfel"},
}
CLDR = (Package(spec="names@1.0.0", sha256=None), Package(spec="derived@1.0.0", sha256=None))


@pytest.fixture
def cldr(
    write_deb: WriteDeb, write_npm: Callable[[Package, Mapping[str, object]], None]
) -> tuple[Package, Package]:
    """Packages of names in four languages, written into the folder of write_deb."""
    for package, kind in zip(CLDR, ("annotations", "annotationsDerived"), strict=True):
        files: dict[str, object] = {}
        for language in ("en", "fr", "ar", "de"):
            entries = {
                emoji: {"tts": [names[language]], "default": names[language].split()}
                for emoji, names in NAMED.items()
            }
            body = {kind: {"annotations": entries if kind == "annotations" else {}}}
            files[f"{kind}/{language}/annotations.json"] = body
        write_npm(package, files)
    return CLDR


@pytest.fixture(scope="session")
def tone() -> bytes:
    """A tenth of a second of sound, as FLAC."""
    samples = (8000 * np.sin(np.arange(1600) * 0.2)).astype(np.int16)
    return encode_flac(samples, 16_000)


@pytest.fixture(scope="session")
def samples_of() -> Callable[[Dataset], dict[str, tuple[str, RawSample]]]:
    """All samples of a set by key, each with its split."""

    def read(dataset: Dataset) -> dict[str, tuple[str, RawSample]]:
        return {
            sample.key: (split.name, sample)
            for split in dataset.splits.values()
            for sample in map(split.read, range(len(split)))
        }

    return read
