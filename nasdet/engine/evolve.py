"""Candidates scored generation by generation, by one process or by several, and kept so that nothing is lost."""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from nasdet._files import read_json, write_json, write_json_once
from nasdet.arch import Card
from nasdet.search.evolution import Evolution

STATE = "evolution.json"
SCORES = "scores"
_POLL = 0.2
_PATIENCE = 3.0
_UNKNOWN = 200.0


class Scores:
    """What is known of candidates: a file for each, named by the card's key and written once, so that of two scores the
    first counts for all processes (on a GPU two evaluations may differ by a rounding).

    ``folder`` must be one that all of them see; ``of`` says in plain data what the scores are of: those of anything
    else lie in other folders in it. ``rank`` is noted beside a score.
    """

    def __init__(self, folder: Path, rank: int, of: Mapping[str, Any]) -> None:
        text = json.dumps(dict(of), sort_keys=True)
        self.folder, self.rank = folder / hashlib.sha256(text.encode()).hexdigest()[:16], rank

    def add(self, card: Card, score: float) -> None:
        """Store the score of a candidate that this process evaluated, unless one is there."""
        write_json_once(self.folder / f"{card.key}.json", {"score": score, "rank": self.rank})

    def known(self, keys: Iterable[str]) -> dict[str, float]:
        """Those of these scores that are stored by now."""
        paths = {key: self.folder / f"{key}.json" for key in keys}
        return {key: _score(path) for key, path in paths.items() if path.is_file()}


def _score(path: Path) -> float:
    content = read_json(path)
    try:
        return float(content["score"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: score must be a number, got {content!r:.80}") from error


def evolve(
    search: Evolution,
    score: Callable[[Card], float],
    out: Path,
    of: Mapping[str, Any],
    *,
    rank: int = 0,
    ranks: int = 1,
    resume: bool = False,
    progress: bool = True,
) -> None:
    """Run a search to its end; ``search`` then holds every candidate with its score.

    ``score(card)`` must depend on the card alone. The candidates of a generation are dealt to ``ranks`` processes, of
    which this is ``rank``: each evaluates its own and stores the score in a file in ``out/scores``; all learn of it
    there. A process that waits for another's score three times as long as its own slowest candidate took evaluates
    that one too. Process 0 keeps ``out/evolution.json``: ``of``, what the scores are of, and the search's state,
    replaced atomically after every told score.

    With ``resume`` it goes on where all these files are, with any number of processes: each candidate that was being
    evaluated is evaluated again, and the search is the same as if it had never stopped. ``ValueError`` for files of
    something other than ``of``.
    """
    path = out / STATE
    if resume and path.exists():
        _load(search, path, of)
    scores = Scores(out / SCORES, rank, of)

    def keep() -> None:
        if rank == 0:
            write_json(path, {"of": dict(of), "state": search.state_dict()})

    keep()
    slowest = _UNKNOWN
    while not search.done:
        generation = _Generation(search, scores, keep, progress and rank == 0)
        with generation.bar:
            slowest = generation.run(score, rank, ranks, slowest)


def check_same(path: Path, of: Mapping[str, Any], but: Sequence[str] = ()) -> Any:
    """The content of a search's ``evolution.json``; ``ValueError`` where its scores are of something other than
    ``of``, the names in ``but`` aside."""
    content = read_json(path)
    theirs = content.get("of", {}) if isinstance(content, Mapping) else {}
    names = [name for name in {**theirs, **of} if name not in but and theirs.get(name) != of.get(name)]
    if names:
        what = "; ".join(f"{name}: {theirs.get(name)!r:.60} -> {of.get(name)!r:.60}" for name in names)
        raise ValueError(
            f"{path} was written by another search ({what}): resume with the options it was started with, or choose "
            "another --out"
        )
    return content


def _load(search: Evolution, path: Path, of: Mapping[str, Any]) -> None:
    content = check_same(path, of)
    try:
        search.load_state_dict(content["state"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


class _Generation:
    """The candidates of a generation on their way to their scores."""

    def __init__(self, search: Evolution, scores: Scores, keep: Callable[[], None], progress: bool) -> None:
        self.search, self.scores, self.keep = search, scores, keep
        candidates = search.candidates[-1]
        self.cards = [candidate.card for candidate in candidates]
        self.left = {candidate.card.key for candidate in candidates if candidate.score is None}
        self.bar: Any = tqdm(
            total=len(self.cards),
            initial=len(self.cards) - len(self.left),
            desc=f"generation {search.generation + 1}/{search.generations}",
            unit="net",
            file=sys.stderr,
            dynamic_ncols=True,
            mininterval=0.5 if sys.stderr.isatty() else 10.0,
            disable=not progress,
        )

    def run(self, score: Callable[[Card], float], rank: int, ranks: int, slowest: float) -> float:
        """Evaluate this process's share, then wait for the others'; returns the seconds of the slowest evaluation."""
        took: list[float] = []

        def evaluate(card: Card) -> None:
            began = time.monotonic()
            self.scores.add(card, score(card))
            took.append(time.monotonic() - began)
            self.tell()

        self.tell()
        for card in self.cards[rank::ranks]:
            if card.key in self.left:
                evaluate(card)
        since, left = time.monotonic(), len(self.left)
        while self.left:
            patience = _PATIENCE * (max(took) if took else slowest)
            if time.monotonic() - since > patience:
                due = [card for card in self.cards if card.key in self.left]
                evaluate(due[rank % len(due)])  # others who wait begin elsewhere
                left = len(self.left)
                continue
            time.sleep(_POLL)
            self.tell()
            if len(self.left) < left:
                since, left = time.monotonic(), len(self.left)
        return max(took) if took else slowest

    def tell(self) -> None:
        """Tell the search what is known by now."""
        known = self.scores.known(self.left)
        for card in self.cards:
            if card.key in self.left and card.key in known:
                self.left.remove(card.key)
                self.search.tell(card, known[card.key])
                self.keep()
                self.bar.update()
        if self.search.history:
            self.bar.set_postfix(best=f"{self.search.best()[1]:.4g}", refresh=False)
