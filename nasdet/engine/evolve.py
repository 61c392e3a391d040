"""Candidates scored generation by generation, by one process or by several, and kept so that nothing is lost."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from nasdet._files import read_json, write_json
from nasdet.arch import Card
from nasdet.search.evolution import Evolution

STATE = "evolution.json"
SCORES = "scores"
_POLL = 0.2
_PATIENCE = 3.0
_UNKNOWN = 200.0


class Scores:
    """What is known of candidates, by the keys of their cards: a file for each process, which all processes read.

    ``folder`` must be one that all of them see; ``of`` says in plain data what the scores are of, and those of anything
    else are passed over. Files are replaced atomically.
    """

    def __init__(self, folder: Path, rank: int, of: Mapping[str, Any]) -> None:
        self.folder, self.path, self.of = folder, folder / f"rank{rank}.json", dict(of)
        self._own = self._read(self.path) if self.path.is_file() else {}

    def _read(self, path: Path) -> dict[str, float]:
        content = read_json(path)
        return dict(content["scores"]) if content["of"] == self.of else {}

    def add(self, card: Card, score: float) -> None:
        """Store the score of a candidate that this process evaluated."""
        self._own[card.key] = score
        write_json(self.path, {"of": self.of, "scores": self._own})

    def known(self) -> dict[str, float]:
        """All scores stored by now."""
        found: dict[str, float] = {}
        for path in sorted(self.folder.glob("rank*.json")):
            found |= self._read(path)
        return found


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
    which this is ``rank``: each evaluates its own and stores the score in ``out/scores/rankN.json``; all learn of it
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


def check_same(path: Path, of: Mapping[str, Any]) -> Any:
    """The content of a search's ``evolution.json``; ``ValueError`` where its scores are of something other than
    ``of``."""
    content = read_json(path)
    theirs = content.get("of", {}) if isinstance(content, Mapping) else {}
    names = [name for name in {**theirs, **of} if theirs.get(name) != of.get(name)]
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
                evaluate(next(card for card in self.cards if card.key in self.left))
            else:
                time.sleep(_POLL)
                self.tell()
            if len(self.left) < left:
                since, left = time.monotonic(), len(self.left)
        return max(took) if took else slowest

    def tell(self) -> None:
        """Tell the search what is known by now."""
        known = self.scores.known()
        for card in self.cards:
            if card.key in self.left and card.key in known:
                self.left.remove(card.key)
                self.search.tell(card, known[card.key])
                self.keep()
                self.bar.update()
        if self.search.history:
            self.bar.set_postfix(best=f"{self.search.best()[1]:.4g}", refresh=False)
