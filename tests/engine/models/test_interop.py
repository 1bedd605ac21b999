"""CLIP weights of Hugging Face (live) and OpenCLIP (fixtures) give their origin's embeddings."""

import json
import runpy
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from carillon.engine.config import UserError
from carillon.engine.models.interop import fuse_heads, load_clip
from carillon.engine.models.towers.dual_encoder import DualEncoder, count_parameters

FIXTURES = Path(__file__).parents[2] / "fixtures"
RECIPE = runpy.run_path(str(FIXTURES / "seeded_weights.py"))
# Promised: embeddings of unit norm to 1e-4, fp32 on both sides.
EMBEDDING = 1e-4


def assert_embeds(model: DualEncoder, pictures: Tensor, captions: Tensor, **want: Tensor) -> None:
    lengths = captions.argmax(-1) + 1
    with torch.no_grad():
        got = {
            "image": model.encode_image(pictures),
            "text": model.encode_text(captions[:, : int(lengths.max())], lengths),
        }
    for name, features in want.items():
        assert (got[name] - features).abs().max() < EMBEDDING
        # The fixture tells its rows apart far above the bound, so that a constant would fail.
        assert (features[0] - features[1]).abs().max() > 100 * EMBEDDING


@pytest.fixture(scope="module")
def hugging_face(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Any]]:
    """A random CLIP ViT-B/32 of transformers, saved in shards; the activation is in its config."""
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig()).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # at their initial values gains and biases would hide a mix-up
                parameter.add_(torch.empty_like(parameter).uniform_(-0.3, 0.3))
    folder = tmp_path_factory.mktemp("hugging_face")
    model.save_pretrained(folder, max_shard_size="250MB")
    yield folder, model
    shutil.rmtree(folder)  # 600 MB


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_hugging_face_clip_gives_the_same_embeddings(
    hugging_face: tuple[Path, Any], activation: str, tmp_path: Path
) -> None:
    from transformers.activations import ACT2FN

    folder, theirs = hugging_face
    for file in folder.iterdir():
        (tmp_path / file.name).symlink_to(file)
    config = json.loads((folder / "config.json").read_text())
    for tower in ("vision_config", "text_config"):
        config[tower]["hidden_act"] = activation
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(config))
    for layer in (*theirs.vision_model.encoder.layers, *theirs.text_model.encoder.layers):
        layer.mlp.activation_fn = ACT2FN[activation]

    model = load_clip(tmp_path)
    assert count_parameters(model) == 151_277_313
    assert model.logit_scale.item() == theirs.logit_scale.item()
    pictures = torch.from_numpy(RECIPE["pictures"](2, 224))
    captions = torch.from_numpy(RECIPE["captions"]([77, 5, 23], 77, 49_408))
    with torch.no_grad():
        want = theirs(input_ids=captions, pixel_values=pictures)
    assert_embeds(model, pictures, captions, image=want.image_embeds, text=want.text_embeds)


def openclip_folder(tmp_path: Path, name: str) -> tuple[Path, dict[str, Any]]:
    fixture: dict[str, Any] = json.loads((FIXTURES / f"openclip_{name}.json").read_text())
    drawn = RECIPE["weights"](fixture["shapes"])
    save_file(
        {key: torch.from_numpy(value) for key, value in drawn.items()},
        tmp_path / "open_clip_model.safetensors",
    )
    config = {"model_cfg": fixture["model_cfg"], "preprocess_cfg": {}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    return tmp_path, fixture


@pytest.mark.parametrize("name", ["vit_b_32", "tiny_quickgelu", "tiny_custom_text"])
def test_openclip_gives_the_same_embeddings(name: str, tmp_path: Path) -> None:
    folder, fixture = openclip_folder(tmp_path, name)
    model = load_clip(folder)
    (folder / "open_clip_model.safetensors").unlink()  # 600 MB where the shape is real
    size, text = fixture["model_cfg"]["vision_cfg"]["image_size"], fixture["model_cfg"]["text_cfg"]
    captions = RECIPE["captions"](fixture["lengths"], text["context_length"], text["vocab_size"])
    assert_embeds(
        model,
        torch.from_numpy(RECIPE["pictures"](2, size)),
        torch.from_numpy(captions),
        image=torch.tensor(fixture["image"]),
        text=torch.tensor(fixture["text"]),
    )
    assert model.logit_scale.item() == pytest.approx(fixture["logit_scale"], rel=1e-6)


def test_loaded_model_trains_and_does_not_touch_the_file(tmp_path: Path) -> None:
    folder, _ = openclip_folder(tmp_path, "tiny_quickgelu")
    file = folder / "open_clip_model.safetensors"
    before = file.read_bytes()
    model = load_clip(folder)
    assert all(value.requires_grad and not value.is_meta for value in model.parameters())
    with torch.no_grad():
        for value in model.parameters():
            value.zero_()
    assert file.read_bytes() == before


def test_weights_without_config_need_the_activation(tmp_path: Path) -> None:
    folder, _ = openclip_folder(tmp_path, "tiny_quickgelu")
    file = folder / "open_clip_model.safetensors"
    (folder / "open_clip_config.json").unlink()
    with pytest.raises(UserError, match=r"do not say their activation.*quick_gelu"):
        load_clip(file)
    # Read off the weights, heads are taken to be 64 wide: this one's 48 are none.
    with pytest.raises(UserError, match=r"vision num_heads 0 given"):
        load_clip(file, activation="gelu")


def test_missing_surplus_and_misshapen_tensors_are_named_and_counted(tmp_path: Path) -> None:
    folder, fixture = openclip_folder(tmp_path, "tiny_quickgelu")
    file = folder / "open_clip_model.safetensors"
    whole = {k: torch.from_numpy(v) for k, v in RECIPE["weights"](fixture["shapes"]).items()}
    part = {k: v for k, v in whole.items() if "visual.ln_post" not in k}
    save_file(part | {"adapter.weight": torch.zeros(1)}, file)
    with pytest.raises(UserError, match=r"2 missing \(visual.ln_post.bias.*1 surplus \(adapter"):
        load_clip(folder)
    save_file(whole | {"visual.proj": torch.zeros(20, 48)}, file)
    with pytest.raises(UserError, match=r"visual.proj of shape \(20, 48\) cannot become"):
        load_clip(folder)
    save_file(whole | {"transformer.resblocks.1.attn.in_proj_bias": torch.zeros(119)}, file)
    with pytest.raises(UserError, match=r"in_proj_bias of shape \(119,\) cannot become"):
        load_clip(folder)


def test_other_models_are_refused(tmp_path: Path) -> None:
    save_file({"bert.embeddings.weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"neither Hugging Face's CLIP nor an OpenCLIP ViT"):
        load_clip(tmp_path)


def test_fused_rows_are_head_major() -> None:
    q, k, v = (torch.arange(6.0).view(6, 1) + 10 * part for part in range(3))
    fused = fuse_heads([q, k, v], num_heads=3).flatten().tolist()
    assert fused == [0, 1, 10, 11, 20, 21, 2, 3, 12, 13, 22, 23, 4, 5, 14, 15, 24, 25]
