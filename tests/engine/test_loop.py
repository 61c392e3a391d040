from __future__ import annotations

import json
import math
import os
import random
import resource
import runpy
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy
import pytest
import torch
from torch import nn

from nasdet.engine.checkpoint import LAST, load_checkpoint, save_checkpoint
from nasdet.engine.loop import Interrupted, Loop, NonFiniteLoss
from nasdet.engine.records import append_line, read_lines

STEPS = 23


class Crash(Exception):
    pass


def train(out, *, resume=False, crash_at=None, steps=STEPS, seed=0, width=4, hook=None, config=None, **options):
    """A toy run that draws from all three generators; crashes before, or in the middle of, step ``crash_at``."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(3, width), nn.Dropout(0.3), nn.Linear(width, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    options = {"log_every": 5, "checkpoint_every": 7, "progress": False, "tensorboard": False, **options}
    state = {"model": model, "optimizer": optimizer}
    loop = Loop(out, steps=steps, state=state, seed=seed, resume=resume, config=config, **options)

    def step(index):
        noise = random.random() + numpy.random.rand()
        loss = (model(torch.randn(8, 3)) - noise).square().mean()
        optimizer.zero_grad()
        loss.backward()
        if index == crash_at:
            raise Crash
        optimizer.step()
        if hook is not None:
            hook(index, model)
        return {"loss": loss, "noise": noise}

    loop.run(step, on_log=lambda done, line: append_line(out / "alphas.jsonl", {"step": done, "alphas": line["noise"]}))
    return model


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def lines(out, name="metrics.jsonl"):
    return [{key: value for key, value in line.items() if key != "seconds"} for line in read_lines(out / name)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    return weights(train(out)), lines(out), lines(out, "alphas.jsonl")


@pytest.mark.parametrize("crash_at", [0, 3, 7, 13, 16, 22], ids=lambda at: f"crash_at_{at}")
def test_resumed_equals_never_killed(tmp_path, whole, crash_at):
    with pytest.raises(Crash):
        train(tmp_path, crash_at=crash_at)
    model = train(tmp_path, resume=True)
    for name, value in model.state_dict().items():
        assert torch.equal(value, whole[0][name]), name
    assert lines(tmp_path) == whole[1]
    assert lines(tmp_path, "alphas.jsonl") == whole[2]
    assert [line["step"] for line in whole[1]] == [5, 10, 15, 20, 23]


def test_crashed_twice_and_in_a_line(tmp_path, whole):
    for crash_at in (9, 20):
        with pytest.raises(Crash):
            train(tmp_path, crash_at=crash_at, resume=True)
        with open(tmp_path / "metrics.jsonl", "a") as file:
            file.write('{"step": 21, "lo')
    model = train(tmp_path, resume=True)
    assert all(torch.equal(value, whole[0][name]) for name, value in model.state_dict().items())
    assert lines(tmp_path) == whole[1]


def test_finished_run_resumes_to_nothing(tmp_path, whole):
    train(tmp_path)
    before = (tmp_path / LAST).stat().st_mtime_ns
    model = train(tmp_path, resume=True, hook=lambda index, model: pytest.fail("a step ran"))
    assert all(torch.equal(value, whole[0][name]) for name, value in model.state_dict().items())
    assert (tmp_path / LAST).stat().st_mtime_ns == before
    assert lines(tmp_path) == whole[1]


def test_line_holds_means_rate_and_seconds(tmp_path):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.5)
    options = {"log_every": 2, "progress": False, "tensorboard": False}
    loop = Loop(tmp_path, steps=3, state={"optimizer": optimizer, "alpha": optimizer}, **options)
    loop.run(lambda index: {"loss": float(index), **({"rare": 8} if index == 1 else {})})
    first, last = read_lines(tmp_path / "metrics.jsonl")
    assert first.pop("seconds") > 0 and last.pop("seconds") > 0
    assert first == {"step": 2, "loss": 0.5, "rare": 8.0, "lr": 0.5, "lr_alpha": 0.5}
    assert last == {"step": 3, "loss": 2.0, "lr": 0.5, "lr_alpha": 0.5}


def test_refuses_to_overwrite(tmp_path):
    train(tmp_path)
    before = (tmp_path / LAST).read_bytes(), (tmp_path / "metrics.jsonl").read_bytes()
    with pytest.raises(ValueError, match=r"already holds a run.*--resume.*--out"):
        train(tmp_path)
    assert before == ((tmp_path / LAST).read_bytes(), (tmp_path / "metrics.jsonl").read_bytes())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 3}, "seed: 0 -> 3"),
        ({"steps": 50}, "steps: 23 -> 50"),
        ({"width": 5}, "'model' does not fit.*size mismatch"),
        ({"config": {"lr": 0.1, "batch": 2}}, "lr: 0.2 -> 0.1"),
    ],
    ids=["seed", "steps", "shape", "config"],
)
def test_refuses_another_configuration(tmp_path, change, message):
    train(tmp_path, config={"lr": 0.2, "batch": 2})
    before = (tmp_path / "metrics.jsonl").read_bytes()
    with pytest.raises(ValueError, match=message):
        train(tmp_path, resume=True, **{"config": {"lr": 0.2, "batch": 2}, **change})
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_weights_are_not_asked_of_a_checkpoint_that_does_not_know_them(tmp_path):
    train(tmp_path, config={"lr": 0.2}, steps=2)
    train(tmp_path, config={"lr": 0.2, "weights": "a"}, steps=2, resume=True)
    with pytest.raises(ValueError, match="other: None -> 'a'"):
        train(tmp_path, config={"lr": 0.2, "other": "a"}, steps=2, resume=True)


def test_refuses_other_state_names(tmp_path):
    model = nn.Linear(1, 1)
    Loop(tmp_path, steps=1, state={"model": model}, progress=False, tensorboard=False).run(lambda index: {"loss": 0.0})
    with pytest.raises(ValueError, match=r"state: \['model'\] -> \['model', 'other'\]"):
        Loop(tmp_path, steps=1, state={"model": model, "other": model}, resume=True)


def test_damaged_checkpoint_is_named(tmp_path):
    train(tmp_path)
    content = (tmp_path / LAST).read_bytes()
    (tmp_path / LAST).write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"last\.pt: not a readable checkpoint"):
        train(tmp_path, resume=True)


def test_a_full_disk_is_named_and_the_old_checkpoint_stays(tmp_path):
    save_checkpoint(tmp_path / "last.pt", {"old": torch.zeros(3)})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(OSError, match=r"too large: '.*/last\.pt'$"):
            save_checkpoint(tmp_path / "last.pt", {"new": torch.zeros(10**5), "more": torch.zeros(3)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(load_checkpoint(tmp_path / "last.pt")) == ["old"]
    assert [path.name for path in tmp_path.iterdir()] == ["last.pt"]


def test_an_empty_checkpoint_is_named(tmp_path):
    train(tmp_path)
    (tmp_path / LAST).write_bytes(b"")
    with pytest.raises(ValueError, match=r"last\.pt: not a readable checkpoint: EOFError"):
        train(tmp_path, resume=True)


@pytest.mark.parametrize("names", [["rng"], ["window"], ["step", "state"]], ids=" ".join)
def test_a_checkpoint_that_is_no_runs_is_named(tmp_path, names):
    train(tmp_path)
    payload = load_checkpoint(tmp_path / LAST)
    torch.save({key: value for key, value in payload.items() if key not in names}, tmp_path / LAST)
    with pytest.raises(ValueError, match=rf"last\.pt: not the checkpoint of a run: it has no {', '.join(names)}$"):
        train(tmp_path, resume=True)


@pytest.mark.parametrize("value", [math.nan, math.inf, torch.tensor(math.nan)], ids=["nan", "inf", "tensor"])
def test_non_finite_loss_stops(tmp_path, value):
    options = {"checkpoint_every": 5, "progress": False, "tensorboard": False}
    loop = Loop(tmp_path, steps=20, state={"model": nn.Linear(1, 1)}, **options)
    with pytest.raises(NonFiniteLoss, match=r"step 12: giou = (nan|inf).*last\.pt, holds 10 steps") as caught:
        loop.run(lambda index: {"loss": 1.0, "giou": value if index == 12 else 0.5})
    assert caught.value.step == 12 and caught.value.checkpoint_step == 10 and list(caught.value.terms) == ["giou"]
    assert load_checkpoint(tmp_path / LAST)["step"] == 10


def test_non_finite_loss_without_checkpoint(tmp_path):
    loop = Loop(tmp_path, steps=20, state={}, progress=False, tensorboard=False)
    with pytest.raises(NonFiniteLoss, match="no checkpoint yet") as caught:
        loop.run(lambda index: {"loss": math.nan})
    assert caught.value.checkpoint is None and not (tmp_path / LAST).exists()


def test_poisoned_weights_with_a_finite_loss_are_never_saved(tmp_path):
    def poison(index, model):
        if index == 13:
            model[0].weight.data[0, 0] = math.nan

    with pytest.raises(NonFiniteLoss, match=r"state\.model\.0\.weight") as caught:
        train(tmp_path, hook=poison)
    assert caught.value.checkpoint_step == 7
    saved = load_checkpoint(tmp_path / LAST)
    assert saved["step"] == 7 and all(value.isfinite().all() for value in saved["state"]["model"].values())


def test_unplain_state_is_refused_by_name(tmp_path):
    class Odd:
        def state_dict(self):
            return {"when": Path("x")}

        def load_state_dict(self, state):
            pass

    loop = Loop(tmp_path, steps=1, state={"odd": Odd()}, progress=False, tensorboard=False)
    with pytest.raises(TypeError, match=r"plain data, got .*Path at state\.odd\.when"):
        loop.run(lambda index: {"loss": 0.0})
    assert not (tmp_path / LAST).exists()


def test_interrupt_finishes_the_step_saves_and_says_how_to_resume(tmp_path, whole):
    def press(index, model):
        if index == 10:
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted, match=r"after 11 of 23 steps.*--resume"):
        train(tmp_path, hook=press)
    assert signal.getsignal(signal.SIGINT) is before
    assert load_checkpoint(tmp_path / LAST)["step"] == 11
    model = train(tmp_path, resume=True)
    assert all(torch.equal(value, whole[0][name]) for name, value in model.state_dict().items())
    assert lines(tmp_path) == whole[1]


@pytest.mark.parametrize("name", ["steps", "log_every", "checkpoint_every"])
@pytest.mark.parametrize("value", [0, -1, 2.0, True], ids=str)
def test_bad_numbers(tmp_path, name, value):
    with pytest.raises(ValueError, match=f"{name} must be a positive int"):
        Loop(tmp_path, **{"steps": 1, "state": {}, name: value})


def test_tensorboard_and_bar(tmp_path, capsys):
    pytest.importorskip("tensorboard")
    train(tmp_path, tensorboard=True, progress=True, title="toy")
    assert list((tmp_path / "tb").glob("events.*"))
    assert "toy" in capsys.readouterr().err


KILLED = """
    import sys
    from pathlib import Path

    import torch
    from torch import nn

    from nasdet.engine.loop import Loop

    out = Path(sys.argv[1])
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(64, 512), nn.Dropout(0.3), nn.Linear(512, 64))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    state = {"model": model, "optimizer": optimizer}
    options = dict(log_every=3, checkpoint_every=2, resume=True, tensorboard=False, progress=False)
    loop = Loop(out, steps=300, state=state, **options)

    def step(index):
        loss = model(torch.randn(4, 64)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return {"loss": loss}

    loop.run(step)
    torch.save(model.state_dict(), out / "final.pt")
"""


def test_sigkill_at_random_moments(tmp_path, monkeypatch):
    script = tmp_path / "toy.py"
    script.write_text(textwrap.dedent(KILLED))
    root = Path(__file__).resolve().parents[2]
    path = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}

    def start(out):
        return subprocess.Popen([sys.executable, str(script), str(out)], env=environment)

    monkeypatch.setattr(sys, "argv", [str(script), str(tmp_path / "whole")])
    runpy.run_path(str(script))
    moments = random.Random(time.time_ns())
    killed, out = 0, tmp_path / "killed"
    for _ in range(2):
        process = start(out)
        begun = (out / "metrics.jsonl").stat().st_size if (out / "metrics.jsonl").exists() else 0
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:
            if (out / "metrics.jsonl").exists() and (out / "metrics.jsonl").stat().st_size > begun:
                break
            time.sleep(0.002)
        time.sleep(moments.uniform(0, 0.08))
        process.send_signal(signal.SIGKILL)
        killed += process.wait(60) == -signal.SIGKILL
    assert killed >= 1, "no process was killed while it trained"
    assert start(out).wait(120) == 0
    expected = torch.load(tmp_path / "whole" / "final.pt", weights_only=True)
    result = torch.load(out / "final.pt", weights_only=True)
    assert all(torch.equal(result[name], value) for name, value in expected.items())
    assert lines(out) == lines(tmp_path / "whole")
    assert not list((out / "checkpoints").glob(".last.pt.*"))
    assert json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 300
