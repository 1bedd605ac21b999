from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

from carillon.engine.config import (
    UserError,
    build,
    config_hash,
    load,
    section,
    setting,
    to_values,
    to_yaml,
)
from carillon.engine.strict_yaml import dump_yaml, parse_yaml
from carillon.engine.train.run_config import RunConfig


@dataclass(frozen=True, kw_only=True)
class Inner:
    width: int = setting(8, "width", min=1, max=100)
    names: tuple[str, ...] = setting((), "names")
    weights: dict[str, float] = setting({}, "weights")


@dataclass(frozen=True, kw_only=True)
class Outer:
    rate: float = setting(0.1, "rate", min=0)
    kind: Literal["a", "bee"] = setting("a", "kind")
    note: str | None = setting(None, "note")
    folder: str = setting("runs", "folder", hashed=False)
    inner: Inner = section(Inner)

    def check(self) -> Iterator[str]:
        if self.kind == "bee" and self.inner.width > 10:
            yield "kind: a bee is at most 10 wide"


def test_a_full_file_loads_and_what_is_written_loads_back_equal(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    text = "rate: 3e-4\nkind: bee\nnote: 'no'\ninner: {width: 4, names: [no, on, '1e3']}\n"
    file.write_text(text)
    config = load(file, ["inner.weights.en=2", "folder=elsewhere"], Outer)
    assert config == Outer(
        rate=3e-4,
        kind="bee",
        note="no",
        folder="elsewhere",
        inner=Inner(width=4, names=("no", "on", "1e3"), weights={"en": 2.0}),
    )
    file.write_text(to_yaml(config))
    assert load(file, [], Outer) == config


def test_the_hash_ignores_order_formatting_defaults_and_folders(tmp_path: Path) -> None:
    one, two = tmp_path / "1.yaml", tmp_path / "2.yaml"
    one.write_text("kind: bee\nrate: 1e-1\ninner: {width: 4}\nfolder: x\n")
    two.write_text("inner:\n  names: []\n  width: 0x4\nrate: .1\n# a comment\nkind: 'bee'\n")
    assert config_hash(load(one, [], Outer)) == config_hash(load(two, [], Outer))


def test_every_hashed_value_changes_the_hash() -> None:
    changed = [
        Outer(rate=0.2),
        Outer(kind="bee"),
        Outer(note=""),
        Outer(inner=Inner(width=9)),
        Outer(inner=Inner(names=("a",))),
        Outer(inner=Inner(weights={"a": 1.0})),
    ]
    hashes = [config_hash(config) for config in [Outer(), *changed]]
    assert len(set(hashes)) == len(hashes)
    assert config_hash(Outer(folder="other")) == hashes[0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rat: 1", "rat: unknown key; did you mean rate?"),
        ("inner: {widht: 1}", "inner.widht: unknown key; did you mean inner.width?"),
        ("zzz: 1", "the top level has folder, inner, kind, note, rate"),
        ("rate: fast", "rate: expected a number, got 'fast' (str)"),
        ("rate: true", "rate: expected a number, got True (bool)"),
        ("rate: -1", "rate: -1.0 (float) given, at least 0 is allowed"),
        ("rate: .nan", "a finite number is needed"),
        ("rate: .inf", "a finite number is needed"),
        ("inner: {width: 1.5}", "inner.width: expected a whole number, got 1.5 (float)"),
        ("inner: {width: 101}", "at most 100 is allowed"),
        ("inner: 5", "inner: expected a section (key: value), got 5 (int)"),
        ("inner: {names: 5}", "inner.names: expected a list such as [a, b], got 5 (int)"),
        ("inner: {names: [1]}", "inner.names[0]: expected text, got 1 (int)"),
        ("inner: {weights: [1]}", "inner.weights: expected a mapping"),
        ("kind: c", "kind: 'c' (str) given, allowed: a, bee"),
        ("note: 3", "note: expected text, got 3 (int)"),
        ("kind: bee\ninner: {width: 50}", "kind: a bee is at most 10 wide"),
        ("rate: 1\nrate: 2", "line 2: key 'rate' is given twice"),
        ("a: &x 1\nb: *x", "line 2: aliases (*name) are not allowed"),
        ("a: !!python/object:os.system x", "line 1: tags (!!python/object:os.system) are not"),
        ("a: !!python/object/apply:os.system [x]", "tags (!!python/object/apply:os.system) are"),
        ("flag: !!bool maybe", "tags (!!bool) are not allowed; write the plain value"),
        ("a: !!timestamp foo", "tags (!!timestamp) are not allowed"),
        ("a: !local {b: 1}", "tags (!local) are not allowed"),
        (f"a: {'1' * 400}", "line 1: a number of 400 digits; at most 300 are allowed"),
        (f"a: {'1' * 5000}", "line 1: a number of 5,000 digits; at most 300 are allowed"),
        ("[1, 2]", "expected sections (key: value), got list"),
        ("a: [", "line 1"),
        ("a: 1\n---\nb: 2", "line 2: but found another document"),
        ("<<: {a: 1}", "<<: unknown key"),
    ],
)
def test_bad_input_is_named_with_what_is_allowed(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    with pytest.raises(UserError) as error:
        load(file, [], Outer)
    assert message in str(error.value)
    assert str(file) in str(error.value)


def test_all_problems_are_reported_at_once() -> None:
    with pytest.raises(UserError) as error:
        build(Outer, {"rat": 1, "kind": 2, "inner": {"width": "x"}})
    assert str(error.value).splitlines()[0] == "config: 3 problems"


@pytest.mark.parametrize("override", ["rate", "=1", "inner..width=1", "rate.x=1", "rate=[", "x=*y"])
def test_bad_overrides_are_refused(tmp_path: Path, override: str) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("rate: 1")
    with pytest.raises(UserError, match="override"):
        load(file, [override], Outer)


def test_missing_files_and_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No such file"):
        load(tmp_path / "none.yaml", [], Outer)
    with pytest.raises(UserError, match="is a folder"):
        load(tmp_path, [], Outer)


@pytest.mark.parametrize(
    "text", [b"a: " + b"[" * 5000, b"a: " + b"x" * (2 << 20), b"\xff\xfe\xff", b"a: \x00"]
)
def test_hostile_bytes_are_refused_quickly(tmp_path: Path, text: bytes) -> None:
    file = tmp_path / "c.yaml"
    file.write_bytes(text)
    with pytest.raises(UserError):
        load(file, [], Outer)


def test_yaml_scalars_follow_the_1_2_core_schema() -> None:
    text = b"a: no\nb: 3e-4\nc: 1:30\nd: 2024-01-01\ne: 0o17\nf: ~\ng: yes\nh: 007"
    values = parse_yaml(text, "")
    assert values == {
        "a": "no",
        "b": 3e-4,
        "c": "1:30",
        "d": "2024-01-01",
        "e": 15,
        "f": None,
        "g": "yes",
        "h": 7,
    }


def test_written_yaml_is_read_back_equal_for_awkward_values() -> None:
    values = {"a": 1e-5, "b": ["no", "3e-4", "", "~", "x: y", "# z", "ü\n"], "c": {}, "d": -0.0}
    assert parse_yaml(dump_yaml(values).encode(), "") == values
    assert to_values(Outer())["inner"] == {"width": 8, "names": [], "weights": {}}


@dataclass(frozen=True, kw_only=True)
class Stages:
    stage: Literal[0, 1, 2] = setting(0, "stage")
    factor: int = setting(1, "factor", choices=(1, 2))
    anything: Any = setting(1, "anything", choices=(1, 2))


@pytest.mark.parametrize("key", ["stage", "factor", "anything"])
@pytest.mark.parametrize("value", [True, False, 1.0])
def test_true_and_1_point_0_are_not_the_choice_1(key: str, value: object) -> None:
    with pytest.raises(UserError, match=rf"{key}: .*{value}"):
        build(Stages, {key: value})
    assert build(Stages, {key: 1}) == Stages(**{"stage": 0, key: 1})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["loss.itc.bias=-5"], "loss.itc.bias: -5 given, but only kind=sigmoid has a bias"),
        (
            ["data.augment.image.randcrop=false", "data.augment.image.min_scale=0.9"],
            "data.augment.image.randcrop: false leaves min_scale without effect",
        ),
        (
            ["data.tokenizer.path=t.json", "data.tokenizer.vocab_size=900"],
            "data.tokenizer.path: a given tokenizer is not trained, so drop vocab_size, or path",
        ),
        (["optimization.ema_decay=1"], "optimization.ema_decay: 1 never moves the average"),
        (
            ["optimization.schedule=constant", "optimization.min_lr_share=0.1"],
            "optimization.min_lr_share: a constant schedule has no end",
        ),
    ],
)
def test_settings_that_would_do_nothing_are_refused(
    tmp_path: Path, overrides: list[str], message: str
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("data: {path: x}\noptimization: {steps: 1}")
    load(file, [], RunConfig)
    with pytest.raises(UserError) as error:
        load(file, overrides, RunConfig)
    assert message in str(error.value)
    assert "1 problem\n" in str(error.value)
