"""Classes that a call names, as their numbers."""

import difflib
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import cast

import torch
from torch import Tensor

ClassLabels = int | str | Sequence[int | str] | Tensor


def find_label_ids(
    class_labels: int | str | Sequence[int | str] | Tensor, num_classes: int | None, id2label: Mapping[int, str]
) -> list[int]:
    """Turn classes in any form into a list of their numbers: a number, a name, a list of either, an integer tensor."""
    if num_classes is None:
        raise ValueError("This model is unconditional: leave class_labels out and give batch_size.")
    if isinstance(class_labels, Tensor):
        if class_labels.is_floating_point() or class_labels.dtype == torch.bool or class_labels.ndim > 1:
            raise ValueError(
                "class_labels must be integers in at most one dimension, "
                f"got {class_labels.dtype} of shape {tuple(class_labels.shape)}."
            )
        class_labels = class_labels.reshape(-1).tolist()
    elif isinstance(class_labels, (bytes, Set, Mapping)):  # in no order that says which image is of which class
        raise ValueError(
            f"class_labels must be a number, a name or a list of them, got a {type(class_labels).__name__}."
        )
    elif isinstance(class_labels, str) or not isinstance(class_labels, Iterable):
        class_labels = [class_labels]
    whole = {name: number for number, name in reversed(list(id2label.items()))}
    # ImageNet's names are several words for one class, parted by commas; a `DiTPipeline` takes each.
    parts = {part.strip(): number for name, number in whole.items() for part in name.split(",")}
    numbers = {**parts, **whole}
    ids = [_find_label_id(label, num_classes, numbers) for label in class_labels]
    if not ids:
        raise ValueError("class_labels is empty.")
    return ids


def _find_label_id(label: int | str | Tensor, num_classes: int, numbers: Mapping[str, int]) -> int:
    if isinstance(label, str):
        if label not in numbers:
            close = difflib.get_close_matches(label, numbers)
            hint = f"did you mean {close[0]!r}?" if close else "pipe.id2label lists the names."
            raise ValueError(f"Unknown class name {label!r}; {hint}")
        label = numbers[label]
    if isinstance(label, Tensor) and label.ndim == 0:
        label = cast(int, label.item())
    if isinstance(label, bool) or not hasattr(label, "__index__"):
        raise ValueError(f"class_labels must be integers or names, got {label!r}.")
    if not 0 <= label < num_classes:
        raise ValueError(f"class_labels must lie in 0..{num_classes - 1}, got {label}.")
    return int(label)
