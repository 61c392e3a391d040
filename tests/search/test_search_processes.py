"""Searches of two processes: the supernet's steps together, candidates dealt to both; killed, resumed, restarted."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import socket
import subprocess
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

from nasdet.data import open_data
from nasdet.engine.checkpoint import load_checkpoint
from nasdet.engine.records import read_lines
from nasdet.engine.search_detnas import DetNASSearchConfig
from nasdet.engine.search_msnas import MSNASSearchConfig
from nasdet.spaces.detnas import DetNASSpace

# Each process may evaluate as many candidates as it is told, and dies in the midst of the next. It notes how many
# objects it sees in each step, and holds that all processes have gradients for the same parameters.
PROGRAM = """
    import json
    import os
    import sys
    from pathlib import Path

    import torch

    from nasdet.data import Split, open_data
    from nasdet.engine import distributed, evolve, one_shot, step
    from nasdet.engine.distributed import restarted
    from nasdet.engine.search_detnas import DetNASSearchConfig, search_detnas
    from nasdet.engine.search_msnas import MSNASSearchConfig, search_msnas

    torch.set_num_threads(1)
    settings, data, out = json.loads(sys.argv[1]), sys.argv[2], sys.argv[3]
    resume = sys.argv[4] == "resume" or restarted()
    rank, count = int(os.environ.get("RANK", 0)), 0
    allowed = 99 if restarted() else json.loads(sys.argv[5])[rank]
    make, search = {
        "detnas": (DetNASSearchConfig, search_detnas),
        "msnas": (MSNASSearchConfig, search_msnas),
    }[sys.argv[6]]
    real, real_step, real_average = one_shot.evaluate, one_shot.train_step, step.average_gradients
    objects = []

    def evaluate(*arguments, **options):
        global count
        if count >= allowed:
            os._exit(9)
        count += 1
        assert not torch.distributed.is_initialized()
        return real(*arguments, **options)

    def train_step(module, optimizer, batch, *rest, **options):
        objects.append(sum(len(target["boxes"]) for target in batch.targets))
        return real_step(module, optimizer, batch, *rest, **options)

    def average_gradients(parameters):
        parameters = list(parameters)
        patterns = distributed.gather_objects([parameter.grad is not None for parameter in parameters])
        assert all(pattern == patterns[0] for pattern in patterns), "gradients of other parameters elsewhere"
        real_average(parameters)

    one_shot.evaluate = evaluate
    one_shot.train_step, step.average_gradients = train_step, average_gradients
    evolve._PATIENCE = 30.0 if min(json.loads(sys.argv[5])) > 50 else 3.0
    card = search(make(**settings), open_data(data), out, resume=resume, progress=False)
    (Path(out) / f"found{rank}.json").write_text(json.dumps([card.to_json(), count, objects]))
"""
MANY = 99


@pytest.fixture(scope="module")
def launch(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[list[int], str]]:
    """``launch(config, out, allowed, resume, data=...)``: exit codes of as many processes as ``allowed`` has numbers,
    and what they said."""
    script = tmp_path_factory.mktemp("program") / "search.py"
    script.write_text(textwrap.dedent(PROGRAM))
    root = Path(__file__).resolve().parents[2]

    def run(
        config: Any,
        out: Path,
        allowed: Sequence[int],
        resume: bool = False,
        launcher: Sequence[str] = (),
        data: Path = folder,
    ) -> tuple[list[int], str]:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        path = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
        words = [json.dumps(dataclasses.asdict(config)), str(data), str(out), "resume" if resume else "fresh"]
        words += [json.dumps(list(allowed)), "msnas" if isinstance(config, MSNASSearchConfig) else "detnas"]
        command, processes = [sys.executable, *launcher, str(script), *words], []
        if launcher:
            result = subprocess.run(command, env={**os.environ, **shared}, capture_output=True, text=True, timeout=300)
            return [result.returncode], result.stderr
        for rank in range(len(allowed)):
            several = {"WORLD_SIZE": str(len(allowed)), "RANK": str(rank), "LOCAL_RANK": str(rank)}
            environment = {**os.environ, **shared, **(several if len(allowed) > 1 else {})}
            processes.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
        said = "\n".join(process.communicate(timeout=300)[1] for process in processes)
        return [process.returncode for process in processes], said

    return run


@pytest.fixture(scope="module")
def whole(finished: Callable[[str], Path]) -> Path:
    return finished("detnas")


@pytest.fixture(scope="module")
def config(cases: dict[str, Any], whole: Path) -> DetNASSearchConfig:
    """The search of the finished run, with its supernet."""
    return dataclasses.replace(cases["detnas"].config, supernet=str(whole))


def state(out: Path) -> Any:
    return json.loads((out / "evolution.json").read_text())["state"]


def stored(out: Path) -> list[dict[str, float]]:
    """Scores by key, of each process in turn."""
    files = {path.stem: json.loads(path.read_text()) for path in (out / "scores").glob("*/*.json")}
    return [
        {key: one["score"] for key, one in files.items() if one["rank"] == rank}
        for rank in sorted({one["rank"] for one in files.values()})
    ]


def test_two_processes_find_what_one_does(
    launch: Callable[..., Any], config: DetNASSearchConfig, whole: Path, tmp_path: Path
) -> None:
    codes, said = launch(config, tmp_path, [MANY, MANY])
    assert codes == [0, 0], said[-3000:]
    assert state(tmp_path) == state(whole)
    shares = stored(tmp_path)
    assert [len(share) for share in shares] == [4, 4] and not shares[0].keys() & shares[1].keys()
    cards = [json.loads((tmp_path / f"found{rank}.json").read_text())[0] for rank in (0, 1)]
    assert cards[0] == cards[1] == json.loads((tmp_path / "card.json").read_text())
    assert cards[0]["genotype"] == json.loads((whole / "card.json").read_text())["genotype"]
    assert json.loads((tmp_path / "run.json").read_text())["processes"] == 2


def test_one_process_dies_and_the_other_goes_on(
    launch: Callable[..., Any], config: DetNASSearchConfig, whole: Path, tmp_path: Path
) -> None:
    """The candidate that it was at is the only one lost."""
    codes, said = launch(config, tmp_path, [MANY - 50, 1])
    assert codes == [0, 9], said[-3000:]
    assert state(tmp_path) == state(whole)
    assert [len(share) for share in stored(tmp_path)] == [7, 1]


@pytest.mark.slow
def test_both_die_and_one_resumes(
    launch: Callable[..., Any], config: DetNASSearchConfig, whole: Path, tmp_path: Path
) -> None:
    codes, said = launch(config, tmp_path, [2, 1])
    assert codes == [9, 9], said[-3000:]
    known = sum(len(share) for share in stored(tmp_path))
    assert known == 3
    codes, said = launch(config, tmp_path, [MANY], resume=True)
    assert codes == [0], said[-3000:]
    assert state(tmp_path) == state(whole)
    assert json.loads((tmp_path / "found0.json").read_text())[1] == 8 - known, "what was known is not evaluated again"


@pytest.mark.slow
def test_msnas_candidates_are_dealt_too(
    launch: Callable[..., Any], cases: dict[str, Any], finished: Callable[[str], Path], tmp_path: Path
) -> None:
    """Each is trained for some steps before it is scored, by the process that has it alone."""
    whole = finished("msnas")
    config = dataclasses.replace(cases["msnas"].config, supernet=str(whole))
    codes, said = launch(config, tmp_path, [MANY, MANY])
    assert codes == [0, 0], said[-3000:]
    assert state(tmp_path) == state(whole)
    assert all(stored(tmp_path)) and len(stored(tmp_path)) == 2


@pytest.mark.slow
def test_torchrun_starts_all_again(
    launch: Callable[..., Any], config: DetNASSearchConfig, whole: Path, tmp_path: Path
) -> None:
    """When a process dies the launcher ends the others; started again, both go on where they were."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1"]
    codes, said = launch(config, tmp_path, [MANY, 1], launcher=launcher)
    assert codes == [0], said[-3000:]
    assert "exitcode: 9" in said or "exitcode  : 9" in said, said[-3000:]
    assert state(tmp_path) == state(whole)
    evaluated = sum(json.loads((tmp_path / f"found{rank}.json").read_text())[1] for rank in (0, 1))
    assert evaluated < 8, "what was known is not evaluated again"


@pytest.mark.slow
def test_the_supernet_learns_as_in_one_process(
    launch: Callable[..., Any], config: DetNASSearchConfig, tmp_path: Path
) -> None:
    """The same path on both, norms over both halves of a batch; what was on no path has no momentum."""
    few: dict[str, Any] = {"steps": 3, "optimizer": "sgd", "log_every": 1, "supernet": None, "clip": None}
    few |= {"population": 1, "parents": 1, "generations": 1}
    short = dataclasses.replace(config, **few)
    for name, allowed in (("one", [MANY]), ("two", [MANY, MANY])):
        codes, said = launch(short, tmp_path / name, allowed)
        assert codes == [0] * len(allowed), said[-3000:]
    lines = [read_lines(tmp_path / name / "metrics.jsonl") for name in ("one", "two")]
    assert [line["step"] for line in lines[1]] == [1, 2, 3]
    for one, two in zip(*lines, strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-3)
    payload = load_checkpoint(tmp_path / "two" / "checkpoints" / "last.pt")
    space = DetNASSpace("tiny")
    paths = [space.random(Random(f"path {short.seed} {step}")).genotype for step in range(3)]
    names = [
        name for name in payload["state"]["model"] if not name.endswith(("running_mean", "running_var", "tracked"))
    ]
    moved = {names[index] for index in payload["state"]["optimizer"]["state"]}
    blocks = {name.rsplit(".", 3)[0] for name in names if ".branch" in name}
    supernet = [name for name, _ in space.supernet().blocks()]
    on_paths = {f"backbone.{block}.{path[i]}" for path in paths for i, block in enumerate(supernet)}
    assert len(blocks) == 32 and on_paths < blocks
    assert {name.rsplit(".", 3)[0] for name in moved if ".branch" in name} == on_paths
    assert {name for name in names if ".branch" not in name} <= moved, "all else is on every path"


def test_a_step_changes_the_weights_as_in_one_process(
    launch: Callable[..., Any], config: DetNASSearchConfig, tmp_path: Path
) -> None:
    """Of the first step, as norms over 8 values (2 x 2 at 1/32 of two pictures) make later ones multiply what rounding
    leaves: 1e-5 of a value here, 1e-2 after two more."""
    few: dict[str, Any] = {"steps": 1, "optimizer": "sgd", "log_every": 1, "supernet": None, "clip": None}
    short = dataclasses.replace(config, **few, population=1, parents=1, generations=1)
    states = []
    for name, allowed in (("one", [MANY]), ("two", [MANY, MANY])):
        codes, said = launch(short, tmp_path / name, allowed)
        assert codes == [0] * len(allowed), said[-3000:]
        states.append(load_checkpoint(tmp_path / name / "checkpoints" / "last.pt")["state"]["model"])
    torch.testing.assert_close(states[1], states[0], rtol=1e-4, atol=1e-6)


def without_objects(folder: Path, image: int, out: Path) -> Path:
    """A copy of a data folder in which one training image has no objects."""
    shutil.copytree(folder, out)
    path = out / "annotations" / "instances_train.json"
    content = json.loads(path.read_text())
    content["annotations"] = [one for one in content["annotations"] if one["image_id"] != image]
    path.write_text(json.dumps(content))
    return out


def test_one_process_sees_no_objects(
    launch: Callable[..., Any], cases: dict[str, Any], folder: Path, tmp_path: Path
) -> None:
    """Faster R-CNN on MSNAS's supernet: all that is on the path has a gradient there too, so that both can average."""
    few = {"norm": "sync_bn", "steps": 4, "log_every": 1, "population": 1, "parents": 1, "generations": 1}
    config = dataclasses.replace(cases["msnas"].config, **few, tuning_steps=0)
    data = without_objects(folder, open_data(folder).split.search_train[0], tmp_path / "data")
    codes, said = launch(config, tmp_path / "run", [MANY, MANY], data=data)
    assert codes == [0, 0], said[-3000:]
    objects = [json.loads((tmp_path / "run" / f"found{rank}.json").read_text())[2] for rank in (0, 1)]
    alone = [step for step, pair in enumerate(zip(*objects, strict=True)) if min(pair) == 0 < max(pair)]
    assert len(objects[0]) == 4 and [step // 2 for step in alone] == [0, 1], "once an epoch of two steps"
    assert all(math.isfinite(line["loss"]) for line in read_lines(tmp_path / "run" / "metrics.jsonl"))


def test_the_batch_must_be_divisible(launch: Callable[..., Any], config: DetNASSearchConfig, tmp_path: Path) -> None:
    codes, said = launch(dataclasses.replace(config, batch=3, supernet=None), tmp_path, [MANY, MANY])
    assert codes == [1, 1] and "batch must be a multiple of 2 processes, got 3" in said
    assert not (tmp_path / "run.json").exists()
