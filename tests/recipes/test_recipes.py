"""Every recipe is checked, and trains two steps on a tiny set that has the splits it names."""

import importlib.util
import json
import runpy
import shutil
from pathlib import Path

import pytest
import torch

from carillon.engine.cli import main as carillon
from carillon.engine.config import UserError
from carillon.engine.train.run import load_run
from carillon.engine.train.run_config import load_config

ROOT = Path(__file__).resolve().parents[2]
SAMPLE = ROOT / "recipes" / "prd_sample.yaml"
RECIPES = sorted(path for path in (ROOT / "recipes").glob("*.yaml") if path != SAMPLE)
TINY_SET = runpy.run_path(str(Path(__file__).with_name("tiny_set.py")))
SMALL, write_set = TINY_SET["SMALL"], TINY_SET["write_set"]
SCORES = {"dual_encoder": "retrieval/mean_r@10", "decoder": "validation/loss"}


def steps_of(run: Path) -> list[int]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["step"] for line in lines if "loss" in json.loads(line)]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe_is_good(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert carillon(["config", "check", str(recipe), "data.path=data/any"]) == 0
    assert f"{recipe.stem}-" in capsys.readouterr().out  # a run bears its recipe's name


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe_trains_two_steps(recipe: Path, tmp_path: Path) -> None:
    config = load_config(recipe, ["data.path=any"])
    data = write_set(tmp_path / "tiny", config)
    given = [f"data.path={data}", f"logging.output={tmp_path / 'runs'}"]
    given += ["evaluation.in_training.every=2"]
    if config.model.type == "decoder":
        given += TINY_SET["SMALL_DECODER"]
    else:
        given += [*SMALL, "evaluation.bootstrap_samples=10"]
    assert carillon(["train", str(recipe), *given]) == 0
    (run,) = (tmp_path / "runs").glob(f"{recipe.stem}-*")
    assert steps_of(run) == [1, 2]
    assert SCORES[config.model.type] in (run / "metrics.jsonl").read_text()
    if config.model.type == "dual_encoder":
        assert load_run(run).step == 2


def expected_problems() -> list[str]:
    """What the sample asks for and this version, on this machine, does not have."""
    problems = [
        (
            "loss.itm.weight: 0.5 given; image-text matching comes with the fusion towers "
            "(encoder-decoder). Set loss.itm.weight=0 until then"
        ),
    ]
    if not torch.cuda.is_available():
        problems.append(
            "distributed.backend: nccl needs a CUDA device and there is none; use auto or gloo"
        )
    problems.append(
        "negatives.hard_mining.enabled: true given; hard-negative mining comes with the retrieval "
        "side (index and mining). Set negatives.hard_mining.enabled=false until then"
    )
    if importlib.util.find_spec("wandb") is None:
        problems.append(
            "logging.wandb: it is not installed; pip install wandb, or set "
            "logging.wandb.project=null"
        )
    return problems


def test_sample_names_exactly_what_is_to_come(capsys: pytest.CaptureFixture[str]) -> None:
    expected = expected_problems()
    assert carillon(["config", "check", str(SAMPLE)]) == 2
    heading, *problems = capsys.readouterr().err.splitlines()
    assert heading.endswith(f"prd_sample.yaml: {len(expected)} problems")
    assert [problem.strip() for problem in problems] == expected


def test_unknown_backbone_hides_no_other_problem() -> None:
    with pytest.raises(UserError) as caught:
        load_config(SAMPLE, ["model.text_backbone=bertlike-encoder-larg"])
    message = str(caught.value)
    assert f"{len(expected_problems()) + 1} problems" in message
    assert "model.text_backbone: 'bertlike-encoder-larg' is no known backbone" in message
    assert "did you mean bertlike-encoder-large?" in message


# The overrides that the messages above name, and one for a set that was not scored.
SERVED = (
    "data.filters.nsfw=false",
    "loss.itm.weight=0",
    "distributed.backend=auto",
    "negatives.hard_mining.enabled=false",
    "logging.wandb.project=null",
)
TINY = ("model.vision_backbone=vit-ti-16", "model.text_backbone=bertlike-encoder-ti")


def test_sample_trains_and_resumes_once_that_is_off(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))  # where plain tars are indexed
    config = load_config(SAMPLE, [*SERVED, "data.shards=[any]"])
    data = write_set(tmp_path / "tiny", config)
    given = (f"data.shards=[{data}]", f"logging.output={tmp_path / 'runs'}")
    command = ["train", str(SAMPLE), *SERVED, *SMALL, *TINY, *given]
    assert carillon(command) == 0
    (run,) = (tmp_path / "runs").glob("mm_dual_encoder_itc_itm_v1-*")
    unbroken = load_run(run)
    shutil.rmtree(run / "checkpoints" / "step-00000002")
    capsys.readouterr()
    assert carillon(command) == 0
    assert "resumes at step 1 of 2 steps" in capsys.readouterr().err
    resumed = load_run(run)
    assert resumed.step == unbroken.step == 2
    assert steps_of(run) == [1, 2]
    for name, value in unbroken.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], value), name
