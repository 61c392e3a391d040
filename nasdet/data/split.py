"""Which pictures train weights, which choose the architecture, and which do neither."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nasdet._files import write_json
from nasdet.data.errors import ROLES, DataError, TestSplitError

if TYPE_CHECKING:
    from nasdet.data.base import PictureDataset
    from nasdet.data.folder import Folder

VERSION = 1
TEST_SHARE = 0.2


@dataclass(frozen=True)
class Split:
    """A division of a data folder, made once, stored with a hash, and checked wherever it is used.

    Weights and architecture are fitted to different halves of the training data, as in DARTS (Liu et al., ICLR 2019),
    and the result is reported on data that neither has seen.

    Attributes:
        search_train: image ids that train the supernet's weights.
        search_val: image ids that choose the architecture. Together with ``search_train``: all that may be trained on.
        test: image ids for the final number, never to choose by.
        seed: what the division was drawn with.
        fingerprint: SHA-256 of the annotations that were divided.
        test_source: ``source`` of the data set that the test ids number into; ids of another annotation file may be
            the same integers without being the same pictures.
        sha256: hash over all of the above.
    """

    search_train: tuple[int, ...]
    search_val: tuple[int, ...]
    test: tuple[int, ...]
    seed: int
    fingerprint: str
    test_source: str
    sha256: str = field(default="")

    def __post_init__(self) -> None:
        for name in ("search_train", "search_val", "test"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if not self.sha256:
            object.__setattr__(self, "sha256", self.digest())

    @property
    def train(self) -> tuple[int, ...]:
        """Everything that may be trained on: ``search_train`` and ``search_val``, sorted."""
        return tuple(sorted(self.search_train + self.search_val))

    @classmethod
    def make(cls, trainval: PictureDataset, test: PictureDataset | None = None, *, seed: int = 0) -> Split:
        """Divide ``trainval`` 50 / 50; the test part is ``test``, or a fifth of ``trainval`` where there is none.

        A pure function of image ids and seed: ids are ranked by SHA-256 of ``seed:id``, so no random generator's
        version matters. With n images that are not held out, ``search_train`` gets ceil(n / 2).

        Raises:
            DataError: fewer than two images to divide (three when the test part is held out too).
        """
        ranked = sorted(trainval.image_ids, key=lambda i: hashlib.sha256(f"{seed}:{i}".encode()).digest())
        needed = 3 if test is None else 2
        if len(ranked) < needed:
            detail = f"{len(ranked)} images; a split needs at least {needed}"
            raise DataError("too few images", trainval.annotation, "images", detail)
        held_out = 0
        if test is None:
            held_out = min(max(1, round(TEST_SHARE * len(ranked))), len(ranked) - 2)
        tested, ranked = ranked[:held_out], ranked[held_out:]
        half = (len(ranked) + 1) // 2
        return cls(
            search_train=tuple(sorted(ranked[:half])),
            search_val=tuple(sorted(ranked[half:])),
            test=tuple(sorted(tested if test is None else test.image_ids)),
            seed=seed,
            fingerprint=fingerprint(trainval, test),
            test_source=trainval.source if test is None else test.source,
        )

    def digest(self) -> str:
        """SHA-256 over every field but the hash itself."""
        content = {key: value for key, value in asdict(self).items() if key != "sha256"}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def save(self, path: str | Path) -> Path:
        """Write the split as JSON, atomically."""
        return write_json(path, {"format": "nasdet-split", "version": VERSION, **asdict(self)})

    @classmethod
    def load(cls, path: str | Path) -> Split:
        """Read a split; one whose content does not match its hash, or that shares images between parts, is refused.

        Raises:
            DataError: names the file and what is wrong.
        """
        path = Path(path)
        document = _read(path)
        names = [name for name in cls.__dataclass_fields__ if name not in document]
        if names:
            raise DataError("missing key", path, "top level", ", ".join(map(repr, names)))
        split = cls(**{name: _typed(path, name, document[name]) for name in cls.__dataclass_fields__})
        if split.sha256 != split.digest():
            detail = f"stored {split.sha256[:12]}, its content gives {split.digest()[:12]}: edited after it was made"
            raise DataError("split does not match its hash", path, "sha256", detail)
        split._require_disjoint(path)
        return split

    def _require_disjoint(self, path: Path) -> None:
        parts = {"search_train": set(self.search_train), "search_val": set(self.search_val)}
        if self.fingerprint == self.test_source:  # test ids were held out of the same file
            parts["test"] = set(self.test)
        for first in parts:
            for second in parts:
                if first < second and parts[first] & parts[second]:
                    shared = min(parts[first] & parts[second])
                    raise DataError("split parts overlap", path, f"image {shared}", f"in both {first} and {second}")

    def check(self, folder: Folder[Any]) -> None:
        """Refuse a folder whose annotations are not those that were divided.

        Raises:
            DataError: the annotations changed, or images of the split are gone.
        """
        found = fingerprint(folder.trainval, folder.testset)
        if found != self.fingerprint:
            detail = f"split made for {self.fingerprint[:12]}, the folder now has {found[:12]}"
            raise DataError("annotations changed since the split was made", folder.path, "split", detail)
        tested = folder.trainval if folder.testset is None else folder.testset
        for name, ids, dataset in (("train", self.train, folder.trainval), ("test", self.test, tested)):
            gone = set(ids) - set(dataset.image_ids)
            if gone:
                detail = f"{len(gone)} images of the split's {name} part are not usable, first image {min(gone)}"
                raise DataError("split names images that are gone", folder.path, "split", detail)
        if self.test_source != tested.source:
            raise DataError("split tests on other data", folder.path, "split", "its test ids are of another file")


def fingerprint(trainval: PictureDataset, test: PictureDataset | None) -> str:
    """SHA-256 that stands for the annotations of both data sets; that of ``trainval`` alone when there is no other."""
    if test is None:
        return trainval.source
    return hashlib.sha256(f"{trainval.source} {test.source}".encode()).hexdigest()


def require_selectable(dataset: Any, split: Split | None = None) -> None:
    """Refuse to choose an architecture on test data. Every search calls this on the data that it scores on.

    Args:
        dataset: a data set (or part of one) with ``role`` and ``image_ids``.
        split: checked too, besides the one that the data set carries.

    Raises:
        TestSplitError: its role is ``"test"``, or one of its images is in the test part of a split.
        TypeError: no data set of this package, so nothing says that it holds no test data.
    """
    role, ids = getattr(dataset, "role", None), getattr(dataset, "image_ids", None)
    if role not in ROLES or ids is None:
        raise TypeError(f"dataset must have a role and image_ids, got {type(dataset).__name__}")
    if role == "test":
        raise TestSplitError("choosing an architecture on the test split is refused: the data set's role is 'test'")
    for known in (split, getattr(dataset, "split", None)):
        if known is None or getattr(dataset, "source", known.test_source) != known.test_source:
            continue
        shared: Sequence[int] = sorted(set(ids) & set(known.test))
        if shared:
            raise TestSplitError(
                f"choosing an architecture on the test split is refused: {len(shared)} of {len(ids)} images of the "
                f"{role!r} data set are test images, first image {shared[0]}"
            )


def _read(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError("missing split file", path) from error
    except (OSError, ValueError, RecursionError) as error:
        raise DataError("malformed JSON", path, detail=str(error)) from error
    if not isinstance(document, dict) or document.get("format") != "nasdet-split":
        raise DataError("not a split file", path, "top level", "'format' must be 'nasdet-split'")
    if document.get("version") != VERSION:
        raise DataError("unknown split version", path, "version", f"must be {VERSION}, got {document.get('version')!r}")
    return document


def _typed(path: Path, name: str, value: Any) -> Any:
    """``value`` when it has the type of the split's field ``name``."""
    if name in ("search_train", "search_val", "test"):
        if not isinstance(value, list) or not all(type(item) is int for item in value):
            raise DataError("bad value", path, name, "must be a list of integers")
    elif not isinstance(value, int if name == "seed" else str) or value == "":
        raise DataError("bad value", path, name, f"got {value!r}")
    return value
