"""Which split of which data set a command or a setting means, when it names little or nothing."""

from carillon.engine.config import UserError
from carillon.engine.data.config import DataConfig
from carillon.engine.data.shards import Dataset, Split, open_dataset
from carillon.engine.data.training_data import only_set


def training_set(data: DataConfig) -> Dataset:
    """The data set that a run was trained on. Raises UserError when it is not there any more, or
    there are several."""
    return only_set(data).dataset


def choose_split(path: str | None, split: str | None, data: DataConfig) -> tuple[Dataset, Split]:
    """The split named; by default the one trained on, or another set's only one.

    Raises: UserError for a set that is not there, a split that it does not have, or several splits
    of another set with none named.
    """
    dataset = training_set(data) if path is None else open_dataset(path)
    names = ", ".join(dataset.splits)
    if split is not None:
        if split not in dataset.splits:
            raise UserError(f"split {split} is not in {dataset.name}; it has {names}")
        return dataset, dataset.splits[split]
    if path is None:
        return dataset, dataset.splits[only_set(data).split.name]
    if len(dataset.splits) != 1:
        raise UserError(f"{dataset.name} has the splits {names}: name one")
    return dataset, next(iter(dataset.splits.values()))
