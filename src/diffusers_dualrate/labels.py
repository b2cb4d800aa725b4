"""Classes of images: names, numbers, and labels that are none."""

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from datasets import Dataset


def check_num_classes(num_classes: int | None, label_column: str | None) -> None:
    """Raise a `ValueError` if a number of classes is none, or there is no column of them."""
    if num_classes is None:
        return
    if type(num_classes) is not int or num_classes < 1:
        raise ValueError(f"`num_classes` is {num_classes!r}, but must be a positive integer.")
    if label_column is None:
        raise ValueError(f"`num_classes` is {num_classes}, but no `label_column` says which image is of which class.")


def read_labels(
    dataset: "Dataset", label_column: str | None, num_classes: int | None
) -> tuple[np.ndarray | None, dict[int, str] | None]:
    """The number of each row's class, int64 [N], and the names of the classes; `None` twice without a column.

    Raises:
        ValueError: If a row has no class or one that cannot be; the row is named.
    """
    if label_column is None:
        return None, None
    values = dataset.with_format(None).select_columns(label_column)[:][label_column]
    feature = dataset.features[label_column]
    if num_classes is not None or hasattr(feature, "names"):
        id2label = name_classes(feature, label_column, num_classes)
        for row, value in enumerate(values):
            check_label(value, id2label, label_column, row)
        return np.array(values, dtype=np.int64), id2label
    if {type(value) for value in values} - {type(None)} not in ({int}, {str}):
        raise ValueError(f"The column {label_column!r} of {feature} must hold one integer or one string a row.")
    for row, value in enumerate(values):
        if value in (None, -1, ""):
            raise ValueError(f"The row {row} has no class in the column {label_column!r}: its label is {value!r}.")
        if isinstance(value, int) and value < 0:
            raise ValueError(
                f"The row {row} has the label {value} in the column {label_column!r}, but none is negative."
            )
    names = sorted(set(values))
    numbers = {name: number for number, name in enumerate(names)}
    return np.array([numbers[value] for value in values], dtype=np.int64), dict(enumerate(map(str, names)))


def name_classes(feature, label_column: str, num_classes: int | None) -> dict[int, str]:
    """Name of each class: those of a `ClassLabel`, else the numbers up to `num_classes`.

    Raises:
        ValueError: If the column alone does not tell the classes and no number is given.
    """
    names = getattr(feature, "names", [])
    if num_classes is None and not names:
        raise ValueError(f"The column {label_column!r} of {feature} names no classes: give their number.")
    return {i: names[i] if i < len(names) else str(i) for i in range(num_classes or len(names))}


def check_label(value: int | None, id2label: dict[int, str], label_column: str, row: int) -> None:
    """Raise a `ValueError` if a row has no class, or one outside of those there are."""
    if value is None or value == -1:  # so the Hub marks rows without a label
        raise ValueError(f"The row {row} has no class in the column {label_column!r}.")
    if type(value) is not int or not 0 <= value < len(id2label):
        raise ValueError(
            f"The row {row} has the label {value!r} in the column {label_column!r}, outside of the "
            f"{len(id2label)} classes."
        )
