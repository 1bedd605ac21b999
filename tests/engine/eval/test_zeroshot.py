"""Zero-shot accuracy against scikit-learn and hand-made cases."""

import pytest
import torch
from sklearn.metrics import top_k_accuracy_score

from carillon.engine.eval.zeroshot import class_prototypes, fill_templates, zeroshot_metrics


def _names(num_classes: int) -> list[str]:
    return [f"class {c}" for c in range(num_classes)]


@pytest.mark.parametrize("num_classes", [6, 11, 40])
def test_agrees_with_scikit_learn(num_classes: int) -> None:
    generator = torch.Generator().manual_seed(num_classes)
    images = torch.randn(90, 16, generator=generator)
    prototypes = class_prototypes(torch.randn(num_classes * 3, 16, generator=generator), 3)
    labels = torch.randint(num_classes, (90,), generator=generator)
    ours = zeroshot_metrics(images, prototypes, labels, _names(num_classes), bootstrap_samples=10)
    scores = torch.nn.functional.normalize(images.double()) @ prototypes.T
    for k in (1, 5):
        theirs = top_k_accuracy_score(
            labels.numpy(), scores.numpy(), k=k, labels=list(range(num_classes))
        )
        assert ours[f"top{k}"]["value"] == pytest.approx(theirs, abs=1e-6)
    present = [c for c in range(num_classes) if (labels == c).any()]
    shares = [float((labels == c).float().mean()) for c in present]
    mean = sum(s * ours["per_class"][f"class {c}"] for s, c in zip(shares, present, strict=True))
    assert mean == pytest.approx(ours["top1"]["value"], abs=1e-6)


def test_prompt_ensemble_is_the_mean_direction() -> None:
    # Long prompts must not outweigh short ones: both count as unit vectors.
    prompts = torch.tensor([[10.0, 0.0], [0.0, 0.1]])
    torch.testing.assert_close(
        class_prototypes(prompts, 2), torch.full((1, 2), 0.5**0.5, dtype=torch.float64)
    )


def test_prompts_are_ordered_by_class() -> None:
    prompts = fill_templates(["rose", "daisy"], ["a photo of a {}", "{}, a flower"])
    assert prompts == [
        "a photo of a rose",
        "rose, a flower",
        "a photo of a daisy",
        "daisy, a flower",
    ]


def test_a_constant_model_scores_nothing() -> None:
    images, prototypes = torch.ones(12, 4), torch.ones(6, 4)
    scores = zeroshot_metrics(images, prototypes, torch.arange(12) % 6, _names(6))
    assert scores["top1"]["value"] == scores["top5"]["value"] == 0.0


def test_top5_of_five_classes_is_not_reported() -> None:
    scores = zeroshot_metrics(torch.eye(5), torch.eye(5), torch.arange(5), _names(5))
    assert scores["top5"] is None
    assert scores["top1"]["value"] == 1.0
    assert scores["top1"]["times_chance"] == pytest.approx(5)


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match=r'must hold "\{\}" once'):
        fill_templates(["rose"], ["a photo"])
    with pytest.raises(ValueError, match="at least one class"):
        fill_templates([], ["{}"])
    with pytest.raises(ValueError, match="not whole classes"):
        class_prototypes(torch.eye(5), 2)
    with pytest.raises(ValueError, match=r"labels in \[0, 4\)"):
        zeroshot_metrics(torch.eye(4), torch.eye(4), torch.tensor([0, 1, 2, 4]), _names(4))
