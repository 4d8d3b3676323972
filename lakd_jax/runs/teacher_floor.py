"""The least accuracy of a teacher, and what its answers show if it is below."""

from collections.abc import Sequence

import numpy as np

_SHOWN = 8  # classes of a mapping that are listed
_CLEAR = 0.5  # least accuracy in another order that is worth reporting


def fault(floor: float, confusion: np.ndarray) -> str:
    """Describes why a teacher's accuracy on the test split is too low; "" if it is not.

    Args:
      floor: `teacher.floor`; 0: twice chance, at most 0.75, since with two classes
        twice chance would be all, and more than the share of the most frequent class.
      confusion: (classes, classes), how often each label (rows) got each answer.
    """
    accuracy = np.trace(confusion) / confusion.sum()
    if floor:
        low = f"less than the {100 * floor:.2f} % of teacher.floor"
        return low if accuracy < floor else ""
    chance = min(2 / len(confusion), 0.75)
    another = "(teacher.floor sets another limit)"
    if accuracy < chance:
        return f"less than twice chance, the {100 * chance:.2f} % required {another}"
    largest = int(confusion.sum(1).max())
    if np.trace(confusion) <= largest:
        return (
            f"no more than always answering the most frequent class, which has "
            f"{largest} of them, would get {another}"
        )
    return ""


def other_order(confusion: np.ndarray, classes: Sequence[str]) -> str:
    """Describes the order in which a teacher's answers fit the labels, on new lines.

    Args:
      confusion: (classes, classes), how often each label (rows) got each answer.
      classes: names, in the order of the labels.

    Returns:
      "" if the answers are not close to a permutation of the labels.
    """
    answers = _assigned(confusion)
    in_order = confusion[:, answers]
    right, total = int(np.trace(in_order)), int(confusion.sum())
    if fault(0.0, in_order) or right < _CLEAR * total:
        return ""
    moved = [
        f"{answer} is {name}"
        for answer, name in sorted(zip(answers.tolist(), classes, strict=True))
        if classes[answer] != name
    ]
    more = f" and {len(moved) - _SHOWN} more" if len(moved) > _SHOWN else ""
    return (
        f"\nIts classes seem to be in another order than the data's, in which {right} "
        f"of {total} would be right. By number of its output, from 0, probably: "
        f"{', '.join(moved[:_SHOWN])}{more}.\nReorder the rows of its classifier, or "
        "name the data's classes so that they sort in its order."
    )


def _assigned(confusion: np.ndarray) -> np.ndarray:
    """Returns an answer of its own for each label, the most frequent pairs first."""
    share = confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    answers: dict[int, int] = {}
    taken: set[int] = set()
    for place in np.argsort(-share, axis=None, kind="stable").tolist():
        label, answer = divmod(place, len(share))
        if label not in answers and answer not in taken:
            answers[label] = answer
            taken.add(answer)
    return np.array([answers[label] for label in range(len(share))])
