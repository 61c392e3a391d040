"""How a folder's pictures are divided, so that none that chose an architecture is one of the test part."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from nasdet.cli import names

if TYPE_CHECKING:
    from nasdet.arch import Card
    from nasdet.data import DataFolder, Split
    from nasdet.data.folder import Folder

F = TypeVar("F", bound="Folder[Any]")


class Placed(NamedTuple):
    """A card in use, and the split.json of the run that it lies in, where there is one."""

    card: Card
    split: Path | None = None


def placed(*texts: str | None) -> list[Placed]:
    """The cards among what ``--card`` and ``--backbone`` say."""
    from nasdet.arch import load_card

    cards = (text for text in texts if text is not None and names.is_card(text))
    return [Placed(load_card(text), file_beside(text, "split.json")) for text in cards]


def file_beside(card: str, name: str) -> Path | None:
    """A file of the search that made the card: beside it, or above the folder of a search's best cards."""
    file = Path(card)
    if not file.is_file():
        return None
    folders = [file.parent, *([file.parent.parent] if file.parent.name == "cards" else [])]
    return next((folder / name for folder in folders if (folder / name).is_file()), None)


def open_divided(
    data: Path, cards: Sequence[Placed], *, split: Path | None, seed: int, skip_bad: bool, masks: bool = False
) -> DataFolder:
    """The data folder divided by the file ``split``, else as by the searches of ``cards``, else by ``seed``.

    Raises ``ValueError`` where pictures of its test part chose one of the cards, and warns where that is not known.
    """
    from nasdet.data import Split, open_data

    stored = None if split is None else Split.load(split)
    folder = open_data(data, split=stored, seed=seed, skip_bad=skip_bad, masks=masks)
    if stored is None:
        return as_searched(folder, cards)
    _check_unseen(folder, cards)
    return folder


def as_searched(folder: F, cards: Sequence[Placed]) -> F:
    """The folder divided as by the searches of ``cards``, where one of them searched in these very data; else as it is.

    Raises ``ValueError`` where pictures of its test part chose one of the cards, and warns where that is not known.
    """
    from nasdet.data import Split

    of_searches = [found for one in cards if (found := _of_search(one, folder)) is not None]
    of_runs = [Split.load(one.split) for one in cards if one.split is not None]
    fitting = [one for one in (*of_searches, *of_runs) if one.fingerprint == folder.split.fingerprint]
    folder = folder.divided(fitting[0]) if fitting else folder
    _check_unseen(folder, cards)
    return folder


def with_split(folder: DataFolder, file: Path) -> DataFolder:
    """The folder divided as in ``file``, where that is there and was made for this very data; else as it is."""
    from nasdet.data import Split

    if not file.is_file():
        return folder
    split = Split.load(file)
    if split.fingerprint != folder.split.fingerprint:
        if folder.testset is None:
            warn(f"{folder.path}: not the annotations of {file}: its test part may hold pictures that were trained on")
        return folder
    return folder.divided(split)


def warn(line: str) -> None:
    """One line on stderr, by one of several processes."""
    from nasdet.engine.distributed import is_main

    if is_main():
        print(f"warning: {line}", file=sys.stderr)


def _of_search(placed: Placed, folder: Folder[Any]) -> Split | None:
    """The split that the card was searched with, where it is known to be one of these very data."""
    from nasdet.data import Split

    source = placed.card.source
    if (wanted := source.get("split")) is None:
        return None
    if placed.split is not None and (stored := Split.load(placed.split)).sha256 == wanted:
        return stored if stored.fingerprint == folder.split.fingerprint else None
    # A split is a function of the pictures and the seed, so the hash tells whether it was this one.
    drawn = folder.drawn(source.get("split_seed", source.get("seed", 0)))
    return drawn if drawn.sha256 == wanted else None


def _check_unseen(folder: Folder[Any], cards: Sequence[Placed]) -> None:
    """Refuse a test part, held out of the training pictures, that holds pictures which chose a card."""
    if folder.testset is not None:  # no search trains on a folder's own test set, or chooses by it
        return
    for one in cards:
        if one.card.source.get("split") in (None, folder.split.sha256):
            continue
        if (theirs := _of_search(one, folder)) is None:
            unknown = f"{one.card.name} was searched on other annotations than those of {folder.path}"
            warn(f"{unknown}: if on the same pictures, some of the test part may have chosen the architecture")
        elif seen := set(theirs.train) & set(folder.split.test):
            raise ValueError(
                f"split must test on no picture that chose {one.card.name}, got {len(seen)} of "
                f"{len(folder.split.test)} that did: give the split.json of its search with --split FILE"
            )
