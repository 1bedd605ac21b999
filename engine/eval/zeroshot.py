"""Zero-shot classification: a picture's class is the one whose prompts lie nearest.

Each class is the mean of the unit vectors of its filled-in templates, scaled back to unit length
(prompt ensembling), so that adding templates costs nothing at prediction time. Ties count against
the model, as in retrieval. Left out: linear probes and calibrated probabilities.

Legend: N pictures, C classes, T templates, D dims.
Source: Radford et al. 2021 (CLIP), section 3.1.4.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from carillon.engine.eval.retrieval import TIE_MARGIN, bootstrap_intervals, unit_rows

TOP_K = (1, 5)


def fill_templates(class_names: Sequence[str], templates: Sequence[str]) -> list[str]:
    """Return the prompts, class by class: item c * len(templates) + t is template t of class c.

    Raises: ValueError when there is no class, no template, or a template without "{}".
    """
    if not class_names or not templates:
        raise ValueError("zero-shot classification needs at least one class and one template")
    for template in templates:
        if template.count("{}") != 1:
            raise ValueError(f'template {template!r} must hold "{{}}" once, for the class name')
    return [t.replace("{}", name) for name in class_names for t in templates]


def class_prototypes(prompts: Tensor, num_templates: int) -> Tensor:
    """Average the prompts of each class on the sphere.

    Shapes: prompts (C * T, D), in the order of fill_templates -> (C, D) float64 unit rows.
    Raises: ValueError when the number of prompts is no multiple of num_templates.
    """
    if num_templates < 1 or len(prompts) % num_templates:
        raise ValueError(f"{len(prompts)} prompts are not whole classes of {num_templates}")
    units = unit_rows(prompts, "prompts")
    mean_CD = units.view(-1, num_templates, units.shape[1]).mean(dim=1)
    return unit_rows(mean_CD, "class prototypes")


def class_ranks(images: Tensor, prototypes: Tensor, labels: Tensor) -> Tensor:
    """Rank (from 1) of the true class for each picture; equal scores put the true class last.

    Shapes: images (N, D), prototypes (C, D), labels (N,) in [0, C) -> (N,).
    Raises: ValueError for labels outside the classes or embeddings without a score.
    """
    num_classes = len(prototypes)
    if labels.shape != (len(images),) or labels.min() < 0 or labels.max() >= num_classes:
        raise ValueError(f"expected {len(images)} labels in [0, {num_classes})")
    images_ND = unit_rows(images, "images")
    scores_NC = images_ND @ unit_rows(prototypes, "class prototypes").to(images_ND.device).T
    labels_N1 = labels.to(images_ND.device)[:, None]
    own_N1 = scores_NC.gather(1, labels_N1)
    others_NC = scores_NC.scatter(1, labels_N1, float("-inf"))
    return 1 + (others_NC >= own_N1 - TIE_MARGIN).sum(dim=1)


def zeroshot_metrics(
    images: Tensor,
    prototypes: Tensor,
    labels: Tensor,
    class_names: Sequence[str],
    *,
    bootstrap_samples: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """Top-1 and top-5 accuracy with 95% intervals, and top-1 by class, as a JSON-able dict.

    top5 is None with five classes or fewer, where it could only be 1.
    Raises: as class_ranks.
    """
    ranks_N = class_ranks(images, prototypes, labels).cpu()
    result: dict[str, Any] = {"num_images": len(images), "num_classes": len(prototypes)}
    for k in TOP_K:
        result[f"top{k}"] = None
        if k < len(prototypes):
            hits = (ranks_N <= k).double()
            ((low, high),) = bootstrap_intervals(
                hits[:, None], torch.arange(len(hits)), samples=bootstrap_samples, seed=seed
            )
            chance = k / len(prototypes)
            value = float(hits.mean())
            result[f"top{k}"] = {"value": value, "low": low, "high": high, "chance": chance}
            result[f"top{k}"]["times_chance"] = value / chance
    result["per_class"] = {
        name: float((ranks_N[labels.cpu() == c] == 1).double().mean())
        for c, name in enumerate(class_names)
        if (labels == c).any()
    }
    return result
