"""The protocol by hand on a small run, fixed items, bad samples, and the command."""

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sqlalchemy import select

from carillon.engine.cli import main
from carillon.engine.config import UserError, build
from carillon.engine.data.config import DataConfig, FilterConfig
from carillon.engine.data.shards import ShardWriter, open_dataset
from carillon.engine.eval.scoring import encode_set, language_task
from carillon.engine.eval.sets import (
    RetrievalSetConfig,
    ZeroShotSetConfig,
    choose_items,
    default_retrieval_sets,
    hash_order,
    normal_text,
)
from carillon.engine.eval.suite import (
    EvaluationConfig,
    evaluate,
    evaluate_in_training,
    evaluate_run,
)
from carillon.engine.index.encoder import Encoder, run_encoder
from carillon.engine.registry.store import Registry, RunDataset
from carillon.engine.registry.tables import EvaluationRow
from carillon.engine.train.run import LoadedRun

# Opening a checkpoint without process groups is what these commands do; torch warns of it.
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def _png(seed: int) -> bytes:
    import io

    pixels = np.random.default_rng(seed).integers(0, 255, (12, 12, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def _set(out: Path, metas: list[dict[str, object]], broken: tuple[int, ...] = ()) -> Path:
    with ShardWriter(out, name="made", source={}) as writer:
        for i, meta in enumerate(metas):
            media = b"no picture" if i in broken else _png(i)
            writer.write(f"item{i:03d}", {"png": media}, meta, split="all")
    return out


def _data(path: Path) -> DataConfig:
    return DataConfig(path=str(path))


def test_results_are_those_of_a_loop_over_single_items(run: LoadedRun) -> None:
    """R@1 and MRR counted with plain Python from vectors made one at a time."""
    results = evaluate_run(run, sets=["shades"])
    scores = results["retrieval"]["shades"]["languages"]["fr"]["text_to_image"]
    split = open_dataset(run.config.data.path or "").splits["shades"]
    single = Encoder(run.model, run.tokenizer, batch_size=1)
    pictures = torch.cat([b.vectors for b in single.pictures(split, range(len(split)))])
    captions = [split.read(row).meta["captions"]["fr"][0] for row in range(len(split))]
    ranks = []
    for row, caption in enumerate(captions):
        mine = (pictures @ single.texts([caption])[0]).tolist()
        ranks.append(1 + sum(score > mine[row] for i, score in enumerate(mine) if i != row))
    assert scores["r@1"]["value"] == pytest.approx(np.mean([rank == 1 for rank in ranks]))
    assert scores["mrr"]["value"] == pytest.approx(np.mean([1 / rank for rank in ranks]))
    assert scores["r@1"]["value"] > 0.8  # the model has learnt the colours
    assert scores["r@1"]["chance"] == pytest.approx(1 / 8)


def test_default_sets_are_held_out_rows_and_untrained_splits(run: LoadedRun) -> None:
    results = evaluate_run(run)
    assert list(results["retrieval"]) == ["validation", "shades"]
    validation = results["retrieval"]["validation"]
    assert validation["num_pictures"] == 8  # every second of 16 rows
    assert set(validation["languages"]) == {"ar", "en", "fr"}
    assert validation["core_languages"] == ["en", "fr", "ar"]
    assert validation["mean"]["image_to_text"]["r@1"]["value"] == pytest.approx(
        np.mean([s["image_to_text"]["r@1"]["value"] for s in validation["languages"].values()])
    )
    json.dumps(results, allow_nan=False)


def test_several_captions_are_all_queries_with_one_right_picture(run: LoadedRun) -> None:
    languages = evaluate_run(run, sets=["shades"])["retrieval"]["shades"]["languages"]
    english = languages["en"]
    assert (english["text_to_image"]["num_queries"], english["text_to_image"]["num_gallery"]) == (
        16,
        8,
    )
    assert (english["image_to_text"]["num_queries"], english["image_to_text"]["num_gallery"]) == (
        8,
        16,
    )
    # Two right texts of sixteen.
    assert english["image_to_text"]["r@1"]["chance"] == pytest.approx(2 / 16)
    one = RetrievalSetConfig(split="shades", one_text_each=True)
    encoded = encode_set(run_encoder(run), one, run.config.data, seed=0)
    assert len(language_task(encoded, "en", True).texts) == 8


def test_equal_names_are_one_group(run: LoadedRun, tmp_path: Path) -> None:
    names = ["Caf\u00e9", "cafe\u0301", "CAF\u00c9 ", "tea", "tea"]
    path = _set(tmp_path / "names", [{"captions": {"en": [name]}} for name in names])
    one = RetrievalSetConfig(path=str(path))
    encoded = encode_set(run_encoder(run), one, run.config.data, seed=0)
    task = language_task(encoded, "en", False)
    assert sorted(torch.bincount(task.picture_groups).tolist()) == [2, 3]
    results = evaluate_run(run, extra=one)["retrieval"]["data"]["languages"]["en"]
    chance = (3 * 3 + 2 * 2) / 5 / 5
    assert results["image_to_text"]["r@1"]["chance"] == pytest.approx(chance)
    assert normal_text("Stra\u00dfe  X") == normal_text("STRASSE x")


def test_items_follow_from_keys_and_seed_alone(tmp_path: Path) -> None:
    metas = [{"captions": {"en": [str(i)]}} for i in range(40)]
    split = open_dataset(_set(tmp_path / "a", metas)).splits["all"]
    order = hash_order(split, range(40), seed=0)
    assert sorted(order) == list(range(40))
    assert order != list(range(40))
    assert hash_order(split, range(40), seed=1) != order
    # Any subset of the rows keeps its order: more data or another layout moves nothing.
    some = [row for row in range(40) if row % 3]
    assert hash_order(split, some, seed=0) == [row for row in order if row % 3]
    few = choose_items(
        RetrievalSetConfig(split="all", max_queries=7), _data(tmp_path / "a"), seed=0
    )
    assert [item.row for item in few.items] == order[:7]


def test_quota_is_per_language_and_concepts_can_be_unique(tmp_path: Path) -> None:
    metas: list[dict[str, object]] = []
    for i in range(60):
        captions = {"en": [f"name {i}"]} | ({"cs": [f"jmeno {i}"]} if i % 4 == 0 else {})
        metas.append({"captions": captions, "base_concept": f"c{i % 12}"})
    data = _data(_set(tmp_path / "a", metas))
    chosen = choose_items(RetrievalSetConfig(split="all", max_queries=10), data, seed=0)
    assert {code: len(places) for code, places in chosen.by_language.items()} == {
        "cs": 10,
        "en": 10,
    }
    unique = RetrievalSetConfig(split="all", max_queries=50, one_per_concept=True)
    assert len(choose_items(unique, data, seed=0).items) == 12


def test_bad_samples_are_counted_named_and_left_out(run: LoadedRun, tmp_path: Path) -> None:
    metas: list[dict[str, object]] = [{"captions": {"en": [f"n{i}"]}} for i in range(9)]
    path = _set(tmp_path / "a", metas, broken=(2, 5))
    result = evaluate_run(run, extra=RetrievalSetConfig(path=str(path)))["retrieval"]["data"]
    assert result["num_bad"] == 2
    assert {line.split(":")[0] for line in result["bad"]} == {"item002", "item005"}
    assert result["languages"]["en"]["image_to_text"]["num_gallery"] == 7
    ruined = _set(tmp_path / "b", metas, broken=tuple(range(9)))
    with pytest.raises(UserError, match="none of its pictures can be read"):
        evaluate_run(run, extra=RetrievalSetConfig(path=str(ruined)))


def test_batch_size_does_not_change_a_result(run: LoadedRun) -> None:
    config = run.config.evaluation
    results = [
        evaluate(
            Encoder(run.model, run.tokenizer, batch_size=size),
            config,
            run.config.data,
            retrieval={"shades": RetrievalSetConfig(split="shades")},
            zeroshot={},
        )
        for size in (1, 3, 64)
    ]
    assert results[0] == results[1] == results[2]


def test_zero_shot_by_label(run: LoadedRun, colours: Path) -> None:
    config = ZeroShotSetConfig(path=str(colours), split="shades", templates=("{}",))
    evaluation = replace(run.config.evaluation, zeroshot={"colours": config})
    results = evaluate_run(replace(run, config=replace(run.config, evaluation=evaluation)))
    scores = results["zeroshot"]["colours"]
    assert scores["num_classes"] == 8
    assert scores["top1"]["chance"] == pytest.approx(1 / 8)
    assert scores["top1"]["value"] > 0.8
    assert scores["top1"]["value"] == pytest.approx(np.mean(list(scores["per_class"].values())))


def test_in_training_metrics_are_flat_and_restore_the_mode(run: LoadedRun) -> None:
    run.model.train()
    try:
        evaluation = run.config.evaluation
        metrics = evaluate_in_training(run.model, run.tokenizer, evaluation, run.config.data)
        assert run.model.training
    finally:
        run.model.eval()
    r10 = [metrics[f"retrieval/validation/{d}/r@10"] for d in ("image_to_text", "text_to_image")]
    assert metrics["retrieval/mean_r@10"] == pytest.approx(np.mean(r10))
    assert all(math.isfinite(value) for value in metrics.values())


def test_what_cannot_be_scored_is_refused_clearly(run: LoadedRun, colours: Path) -> None:
    with pytest.raises(UserError, match=r"--set no: the run's sets are validation, shades"):
        evaluate_run(run, sets=["no"])
    with pytest.raises(UserError, match="split no is not in colours; it has train, shades"):
        evaluate_run(run, extra=RetrievalSetConfig(split="no"))
    with pytest.raises(UserError, match="has the splits train, shades: name one"):
        evaluate_run(run, extra=RetrievalSetConfig(path=str(colours)))
    with pytest.raises(UserError, match="fewer than two pictures have a caption in xx"):
        evaluate_run(run, languages=["xx"])
    with pytest.raises(UserError, match="no rows of the training data are held out"):
        choose_items(RetrievalSetConfig(), _data(colours), seed=0)
    assert list(default_retrieval_sets(_data(colours))) == ["shades"]


def test_config_is_checked_at_load() -> None:
    with pytest.raises(UserError, match=r'zeroshot.a.templates: .photo. given, "\{\}" must'):
        build(EvaluationConfig, {"zeroshot": {"a": {"path": "x", "templates": ["photo"]}}})
    with pytest.raises(UserError, match=r"in_training.sets: b is not among a"):
        build(EvaluationConfig, {"retrieval": {"a": {}}, "in_training": {"sets": ["b"]}})


def test_a_model_of_nan_is_named(run: LoadedRun) -> None:
    weight = run.model.vision_projection.weight
    kept = weight.detach().clone()
    weight.data.fill_(float("nan"))
    try:
        with pytest.raises(UserError, match="8 of 8 embeddings hold NaN"):
            evaluate_run(run, sets=["shades"])
    finally:
        weight.data.copy_(kept)


def test_eval_run_prints_tables_and_writes_the_run(
    run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", "run", str(run_folder)]) == 0
    printed = capsys.readouterr().out
    for expected in ("image \u2192 text", "text \u2192 image", "R@10 %", "chance", "mean of 3"):
        assert expected in printed
    saved = json.loads((run_folder / "evaluation.json").read_text())
    assert saved["step"] == 150
    assert len(saved["checkpoint_hash"]) == 64
    assert (run_folder / "retrieval.png").is_file()
    arguments = ["--split", "shades", "--languages", "fr", "--max-queries", "4", "--json"]
    assert main(["eval", "run", str(run_folder), *arguments]) == 0
    result = json.loads(capsys.readouterr().out)["retrieval"]["data"]
    assert list(result["languages"]) == ["fr"]
    assert result["num_pictures"] == 4
    assert main(["eval", "run", str(run_folder), "--max-queries", "1"]) == 2
    assert "at least 2" in capsys.readouterr().err


def test_results_enter_the_registry_of_the_run(
    run: LoadedRun, colours: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    registry = Registry.open(run.path.parent / "registry.sqlite")
    dataset = open_dataset(colours)
    registry.record_dataset(dataset)
    run_id = registry.start_run(
        "colours-run",
        config_hash="c",
        params={},
        artifacts_uri=run.path,
        datasets=[RunDataset(dataset.fingerprint)],
    )
    checkpoint = run.path / "checkpoints" / "step-00000150"
    registry.add_checkpoint(run_id, 150, uri=checkpoint, content_hash=run.checkpoint_hash)
    assert main(["eval", "run", str(run.path), "--set", "shades", "--json"]) == 0
    results = json.loads(capsys.readouterr().out)
    with registry.reading() as session:
        (row,) = session.scalars(select(EvaluationRow)).all()
        assert row.suite_name == "retrieval/shades"
        assert row.metrics == results["retrieval"]["shades"]


@pytest.mark.parametrize(
    ("arguments", "row"),
    [
        (["--set", "validation"], "retrieval/validation"),
        (["--max-queries", "4"], "retrieval/validation (max-queries=4)"),
        (["--languages", "fr"], "retrieval/validation (languages=fr)"),
        (
            ["--data", "COLOURS", "--split", "shades", "--set", "validation"],
            "retrieval/validation (data=colours@FINGERPRINT split=shades)",
        ),
        (["--split", "train"], "retrieval/data (data=colours@FINGERPRINT split=train)"),
    ],
)
def test_a_part_or_other_data_stand_beside_the_full_results(
    run: LoadedRun, colours: Path, tmp_path: Path, arguments: list[str], row: str
) -> None:
    registry = Registry.open(tmp_path / "registry.sqlite")
    run_id = registry.start_run("r", config_hash="c", params={}, artifacts_uri=run.path)
    checkpoint = run.path / "checkpoints" / "step-00000150"
    registry.add_checkpoint(run_id, 150, uri=checkpoint, content_hash=run.checkpoint_hash)
    copy = tmp_path / "colours-run"
    shutil.copytree(run.path, copy, ignore=shutil.ignore_patterns("evaluation*", "retrieval*"))

    def rows() -> dict[str, object]:
        with registry.reading() as session:
            return {r.suite_name: r.metrics for r in session.scalars(select(EvaluationRow))}

    def files() -> dict[str, bytes]:
        return {p.name: p.read_bytes() for p in copy.iterdir() if p.name[:4] in ("eval", "retr")}

    command = ["eval", "run", str(copy)]
    assert main(command) == 0
    full, full_rows = files(), rows()
    assert set(full) == {"evaluation.json", "retrieval.png"}
    assert set(full_rows) == {"retrieval/validation", "retrieval/shades"}
    given = [str(colours) if word == "COLOURS" else word for word in arguments]
    assert main([*command, *given]) == 0
    assert main([*command, *given]) == 0  # the same again: in the same place
    assert {name: files()[name] for name in full} == full
    assert rows().items() >= full_rows.items()
    (added,) = (name for name in files() if name.endswith(".json") and name not in full)
    results = json.loads(files()[added])
    assert set(results["options"]) == {"sets", "scope"}
    name = row.replace("FINGERPRINT", open_dataset(colours).fingerprint[:12])
    assert rows()[name] == results["retrieval"][name.split(" ")[0].split("/")[1]]


def test_languages_default_to_those_trained_on(tmp_path: Path) -> None:
    captions = {"en": ["a"], "fr": ["b"], "cs": ["c"]}
    path = _set(tmp_path / "a", [{"captions": captions} for _ in range(4)])
    data = DataConfig(path=str(path), filters=FilterConfig(lang_allow=("fr", "cs")))
    for languages, expected in (((), {"fr", "cs"}), (("en",), {"en"}), (("all",), set(captions))):
        one = RetrievalSetConfig(split="all", languages=languages)
        assert set(choose_items(one, data, seed=0).by_language) == expected


def test_real_sets_are_scored(
    real_data: Callable[[str], Path],
    run: LoadedRun,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # where plain tars are indexed
    flickr = RetrievalSetConfig(
        path=str(real_data("flickr8k") / "flickr8k-dev-0006.tar"), max_queries=20
    )
    flowers = ZeroShotSetConfig(path=str(real_data("flowers5")), max_images=40)
    results = evaluate(
        run_encoder(run),
        run.config.evaluation,
        run.config.data,
        retrieval={"flickr8k": flickr},
        zeroshot={"flowers5": flowers},
    )
    languages = results["retrieval"]["flickr8k"]["languages"]
    assert {"en", "ar", "de", "fr", "cs"} <= set(languages)
    assert languages["en"]["text_to_image"]["num_queries"] == 100
    assert languages["fr"]["text_to_image"]["num_queries"] == 20
    assert results["zeroshot"]["flowers5"]["num_classes"] == 5
    assert results["zeroshot"]["flowers5"]["top1"]["value"] < 0.6  # it has never seen a flower
