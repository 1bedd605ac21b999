import argparse
import gzip
import hashlib
import io
import json
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from carillon.engine.config import UserError
from carillon.engine.data.decode.image import decode_image
from carillon.engine.data.sets import emoji
from carillon.engine.data.sets.build import is_heldout, summary
from carillon.engine.data.sets.emoji import build_emoji
from carillon.engine.data.sets.emoji_concepts import base_concept
from carillon.engine.data.sets.emoji_sources import SOURCES, Pack, Sources
from carillon.engine.data.sets.npm import Package, locate_packages, read_members
from carillon.engine.data.shards import Dataset, RawSample


def package(name: str) -> Package:
    return Package(spec=f"{name}@1.0.0", sha256=None)


TINY = Sources(
    packs=(
        Pack(vendor="joined", package=package("@x/joined"), licence="CC-BY-4.0", author="A"),
        Pack(vendor="noto", package=package("@x/noto"), licence="Apache-2.0", author="A"),
        Pack(vendor="openmoji", package=package("@x/openmoji"), licence="CC-BY-SA-4.0", author="A"),
        Pack(vendor="raster", package=package("@x/raster"), licence="MIT", author="A", raster=True),
    ),
    names=package("names"),
    derived_names=package("derived"),
)
NAMES = {
    "en": {"🔴": "red circle", "❤": "red heart", "👍": "thumbs up", "🐈": "cat"},
    "fr": {"🔴": "disque rouge", "❤": "cœur rouge", "👍": "pouce vers le haut"},
}
DERIVED = {
    "en": {"👍🏿": "thumbs up: dark skin tone"},
    "fr": {"👍🏿": "pouce vers le haut : peau foncée"},
}
CHARS = {"1f534": "red-circle", "2764": "red-heart", "1f44d": "thumbs-up", "1f9ff": "unnamed"}


def tarball(folder: Path, package: Package, files: Mapping[str, bytes]) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(f"package/{name}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    (folder / package.file).write_bytes(gzip.compress(buffer.getvalue(), mtime=0))


def circle(colour: str) -> dict[str, Any]:
    return {"body": f'<circle cx="8" cy="8" r="6" fill="{colour}"/>'}


def iconify(icons: Mapping[str, Any], chars: Mapping[str, str], **more: Any) -> dict[str, bytes]:
    content = {"icons": icons, "width": 16, "height": 16, **more}
    return {
        "icons.json": json.dumps(content).encode(),
        "chars.json": json.dumps(chars).encode(),
    }


def annotations(kind: str, names: Mapping[str, Mapping[str, str]]) -> dict[str, bytes]:
    files = {}
    for language, entries in names.items():
        listed = {text: {"tts": [name], "default": ["word"]} for text, name in entries.items()}
        body = json.dumps({kind: {"annotations": listed}})
        files[f"{kind}/{language}/annotations.json"] = body.encode()
    return files


def write_packages(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    joined, noto, openmoji, raster = (pack.package for pack in TINY.packs)
    named = {name: circle("red") for name in CHARS.values()}
    toned = {**named, "thumbs-up-dark": circle("black")}
    tarball(
        folder,
        noto,
        iconify(
            toned,
            {**CHARS, "1f44d-1f3ff": "thumbs-up-dark"},
            aliases={
                "like": {"parent": "thumbs-up"},
                "flipped": {"parent": "red-heart", "hFlip": 1},
            },
        ),
    )
    tarball(folder, openmoji, iconify(named, CHARS))
    wide = {"body": '<rect width="32" height="16" fill="blue"/>', "width": 32}
    icons = {"like": wide, "flipped": circle("green"), "other": circle("green")}
    tarball(folder, joined, iconify(icons, {}))
    buffer = io.BytesIO()
    Image.new("RGBA", (256, 256), (0, 0, 0, 0)).save(buffer, "WEBP")
    webp = buffer.getvalue()
    assets = {f"assets/{name}.webp": webp for name in ("2764", "2764-fe0f", "1f408")}
    tarball(folder, raster, assets)
    tarball(folder, TINY.names, annotations("annotations", NAMES))
    tarball(folder, TINY.derived_names, annotations("annotationsDerived", DERIVED))
    return folder


def build(tmp_path: Path, name: str = "set", **options: Any) -> Dataset:
    data = write_packages(tmp_path / "npm")
    arguments = {"size": 32, "languages": ("en", "fr"), "data": data, "sources": TINY, **options}
    return build_emoji(tmp_path / name, **arguments)


def samples_of(dataset: Dataset) -> dict[str, tuple[str, RawSample]]:
    found = {}
    for split in dataset.splits.values():
        for row in range(len(split)):
            sample = split.read(row)
            found[sample.key] = (split.name, sample)
    return found


def test_pictures_are_joined_with_names_and_split(tmp_path: Path) -> None:
    samples = samples_of(build(tmp_path))
    concepts = {"1f534", "2764", "1f44d"}
    expected = {f"{vendor}-{concept}" for vendor in ("noto", "openmoji") for concept in concepts}
    expected |= {"noto-1f44d-1f3ff", "joined-1f44d", "raster-2764", "raster-1f408"}
    assert set(samples) == expected
    for key, (split, sample) in samples.items():
        concept_out = is_heldout(base_concept(sample.meta["concept"]))
        vendor_out = key.startswith("openmoji")
        names = {
            (False, False): "train",
            (False, True): "heldout_vendor",
            (True, False): "heldout_concept",
            (True, True): "heldout_both",
        }
        assert split == names[concept_out, vendor_out]
    meta = samples["noto-1f44d-1f3ff"][1].meta
    assert meta["captions"] == {
        "en": ["thumbs up: dark skin tone"],
        "fr": ["pouce vers le haut : peau foncée"],
    }
    assert meta["keywords"] == {"en": ["word"], "fr": ["word"]}
    assert (meta["base_concept"], meta["licence"]) == ("1f44d", "Apache-2.0")
    assert meta["caption_licence"] == "Unicode-3.0"
    assert meta["author"] == "A"
    assert meta["licence_source"] == "npm:@x/noto@1.0.0 package/package.json"
    assert meta["media"] == {"webp": {"width": 32, "height": 32}}
    assert meta["source"] == "npm:@x/noto@1.0.0"
    assert samples["raster-1f408"][1].meta["captions"] == {"en": ["cat"]}


def test_pictures_are_on_white_at_the_size_asked_for(tmp_path: Path) -> None:
    samples = samples_of(build(tmp_path))
    red = decode_image(samples["noto-2764"][1].medium("image"))
    assert red.shape == (32, 32, 3)
    assert tuple(red[0, 0]) == (255, 255, 255)
    assert tuple(red[16, 16]) == (255, 0, 0)
    wide = decode_image(samples["joined-1f44d"][1].medium("image"))  # 2:1, so white above and below
    assert wide.shape == (32, 32, 3)
    assert tuple(wide[4, 16]) == (255, 255, 255)
    assert tuple(wide[16, 16]) == (0, 0, 255)
    transparent = decode_image(samples["raster-2764"][1].medium("image"))
    assert transparent.shape == (32, 32, 3)
    assert transparent.min() == 255


def test_the_same_packages_give_the_same_bytes(tmp_path: Path) -> None:
    first = build(tmp_path, "a")
    second = build(tmp_path, "b", workers=2)
    assert first.fingerprint == second.fingerprint
    assert build(tmp_path, "c", size=16).fingerprint != first.fingerprint


def test_a_finished_set_is_reused_and_another_is_not_overwritten(tmp_path: Path) -> None:
    build(tmp_path)
    before = (tmp_path / "set" / "dataset.json").stat().st_mtime_ns
    again = build_emoji(
        tmp_path / "set", size=32, languages=("en", "fr"), data=tmp_path / "no", sources=TINY
    )
    assert len(again.splits) >= 2
    assert (tmp_path / "set" / "dataset.json").stat().st_mtime_ns == before
    with pytest.raises(UserError, match="built with other settings"):
        build(tmp_path, size=48)
    replaced = build(tmp_path, size=48, overwrite=True)
    picture = samples_of(replaced)["noto-2764"][1].medium("image")
    assert decode_image(picture).shape == (48, 48, 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 8}, "--size 8 is out of range"),
        ({"workers": 0}, "at least one process"),
        ({"languages": ("en", "xx")}, "--languages xx: CLDR has en, fr"),
        ({"languages": ("en", "en")}, "give each language once"),
        ({"languages": ()}, "give each language once"),
    ],
)
def test_bad_settings_are_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build(tmp_path, **options)
    assert not (tmp_path / "set").exists()


def test_an_icon_that_reaches_for_files_is_refused(tmp_path: Path) -> None:
    data = write_packages(tmp_path / "npm")
    body = '<image href="/etc/passwd" width="16" height="16"/>'
    tarball(data, TINY.packs[2].package, iconify({"red-heart": {"body": body}}, CHARS))
    with pytest.raises(UserError, match="the icon 'red-heart' holds one of <image"):
        build_emoji(tmp_path / "set", languages=("en",), data=data, sources=TINY)


def test_missing_packages_are_named(tmp_path: Path) -> None:
    data = write_packages(tmp_path / "npm")
    (data / "x-noto-1.0.0.tgz").unlink()
    with pytest.raises(UserError, match=r"lacks x-noto-1\.0\.0\.tgz.*npm pack @x/noto@1\.0\.0"):
        locate_packages(TINY.packages, data)


def test_without_npm_the_way_out_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"npm was not found\. Install Node\.js .* --data"):
        locate_packages(SOURCES.packages, None)


def test_npm_is_asked_once_for_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_packages(tmp_path / "published")
    npm = tmp_path / "bin" / "npm"
    npm.parent.mkdir()
    npm.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\ncp {data}/*.tgz "$5"\n')
    npm.chmod(0o755)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", f"{npm.parent}:/usr/bin:/bin")
    folder = locate_packages(TINY.packages, None)
    assert folder == locate_packages(TINY.packages, None) == tmp_path / "cache" / "carillon" / "npm"
    calls = (tmp_path / "calls").read_text().splitlines()
    assert len(calls) == 1
    assert all(package.spec in calls[0] for package in TINY.packages)
    npm.write_text("#!/bin/sh\necho 'ENOTFOUND registry' >&2\nexit 1\n")
    (folder / "x-noto-1.0.0.tgz").unlink()
    with pytest.raises(UserError, match=r"`npm pack` failed \(1\): ENOTFOUND registry"):
        locate_packages(TINY.packages, None)


def test_a_swapped_package_is_refused(tmp_path: Path) -> None:
    data = write_packages(tmp_path / "npm")
    names = data / TINY.names.file
    good = Package(spec=TINY.names.spec, sha256=hashlib.sha256(names.read_bytes()).hexdigest())
    sources = Sources(packs=TINY.packs, names=good, derived_names=TINY.derived_names)
    assert locate_packages(sources.packages, data) == data
    names.write_bytes(names.read_bytes() + b"x")
    with pytest.raises(UserError, match="not what was published"):
        locate_packages(sources.packages, data)


def test_a_damaged_package_is_one_message(tmp_path: Path) -> None:
    data = write_packages(tmp_path / "npm")
    path = data / TINY.names.file
    intact = path.read_bytes()
    for damaged in (intact[:-20], b"not gzip", gzip.compress(b"not tar" * 100)):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"names-1\.0\.0\.tgz cannot be read"):
            read_members(path)


def test_the_command_prints_what_the_set_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        emoji.build_emoji,
        "__kwdefaults__",
        {
            **(emoji.build_emoji.__kwdefaults__ or {}),
            "sources": TINY,
        },
    )
    data = write_packages(tmp_path / "npm")
    parser = argparse.ArgumentParser()
    emoji.add_arguments(parser)
    options = ["--out", str(tmp_path / "set"), "--data", str(data), "--languages", "en,fr"]
    assert emoji.main(parser.parse_args([*options, "--workers", "1"])) == 0
    printed = capsys.readouterr().out
    assert "train" in printed
    assert "texts: en 10, fr 9" in printed
    assert "Apache-2.0 4, CC-BY-4.0 1, CC-BY-SA-4.0 3, MIT 2" in printed


def test_the_pinned_sources_are_complete() -> None:
    assert len(SOURCES.packs) == 8
    assert len(emoji.LANGUAGES) == len(set(emoji.LANGUAGES)) == 30
    assert all(package.sha256 and len(package.sha256) == 64 for package in SOURCES.packages)
    assert SOURCES.packs[0].package.file == "iconify-json-noto-1.2.9.tgz"
    assert {pack.vendor for pack in SOURCES.packs} >= {SOURCES.naming, SOURCES.heldout_vendor}


def test_summary_names_every_split(tmp_path: Path) -> None:
    dataset = build(tmp_path)
    text = "\n".join(summary(dataset))
    assert all(name in text for name in dataset.splits)
