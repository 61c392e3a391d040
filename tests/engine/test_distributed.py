from __future__ import annotations

import os
import runpy
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch import nn

from nasdet.engine import distributed
from nasdet.engine.loop import Loop
from nasdet.engine.records import read_lines

# One program for one process with batch 4 and for two with batch 2 each; it is killed once and resumed.
PROGRAM = """
    import os
    import sys
    from pathlib import Path

    import torch
    from torch import nn

    from nasdet.engine import distributed
    from nasdet.engine.loop import Loop
    from nasdet.engine.optim import make_sgd

    out, crash_at, resume = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "resume"


    class Toy(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3)
            self.norm = nn.GroupNorm(2, 8)
            self.drop = nn.Dropout(0.0)

        def forward(self, images):
            return {"map": [self.norm(self.conv(images))]}

        def loss(self, outputs, targets):
            wanted = torch.stack([target["wanted"] for target in targets])
            error = (outputs["map"][0].mean((1, 2, 3)) - wanted).square().mean()
            return {"loss_a": error, "loss_b": outputs["map"][0].abs().mean()}


    device = distributed.local_device("cpu")
    with distributed.process_group(device):
        rank, ranks = distributed.rank(), distributed.world_size()
        torch.manual_seed(0)
        model = Toy()
        optimizer = make_sgd(model, 0.1)
        options = {"log_every": 2, "checkpoint_every": 3, "tensorboard": False, "resume": resume}
        loop = Loop(out, steps=8, state={"model": model, "optimizer": optimizer}, **options)
        module = distributed.wrap(model, device)

        def step(index):
            if index == crash_at:
                os._exit(9)
            generator = torch.Generator().manual_seed(index)
            images, wanted = torch.randn(4, 3, 6, 6, generator=generator), torch.randn(4, generator=generator)
            share = slice(rank * 4 // ranks, (rank + 1) * 4 // ranks)
            terms = module(images[share], [{"wanted": value} for value in wanted[share]])
            optimizer.zero_grad()
            sum(terms.values()).backward()
            optimizer.step()
            return {name: value.detach() for name, value in terms.items()} | {"rank": rank}

        loop.run(step)
        torch.save(model.state_dict(), out / f"rank{rank}.pt")
        gathered = distributed.gather_objects([{"rank": rank}])
        assert gathered == [[{"rank": number}] for number in range(ranks)]
"""


def launch(script, out, crash_at=-1, resume="fresh"):
    """Two processes with the variables that torchrun sets; their exit codes and what they said."""
    root = Path(__file__).resolve().parents[2]
    path = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    shared |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    command = [sys.executable, str(script), str(out), str(crash_at), resume]
    ranks = []
    for rank in ("0", "1"):
        environment = {**os.environ, **shared, "RANK": rank, "LOCAL_RANK": rank}
        ranks.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
    said = [process.communicate(timeout=180)[1] for process in ranks]
    return [process.returncode for process in ranks], "\n".join(said)


def test_two_processes_equal_one(tmp_path, monkeypatch):
    script = tmp_path / "toy.py"
    script.write_text(textwrap.dedent(PROGRAM))
    alone, pair = tmp_path / "alone", tmp_path / "pair"
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "argv", [str(script), str(alone), "-1", "fresh"])
    runpy.run_path(str(script))
    crashed, _ = launch(script, pair, crash_at=5)
    assert crashed == [9, 9] and (pair / "checkpoints" / "last.pt").exists()
    resumed, said = launch(script, pair, resume="resume")
    assert resumed == [0, 0], said[-2000:]
    expected = torch.load(alone / "rank0.pt", weights_only=True)
    ranks = [torch.load(pair / f"rank{rank}.pt", weights_only=True) for rank in range(2)]
    for name, value in expected.items():
        assert torch.equal(ranks[0][name], ranks[1][name]), name
        torch.testing.assert_close(ranks[0][name], value, rtol=1e-5, atol=1e-6)
    ours, theirs = read_lines(alone / "metrics.jsonl"), read_lines(pair / "metrics.jsonl")
    assert [line["step"] for line in theirs] == [2, 4, 6, 8]
    for one, two in zip(ours, theirs, strict=True):
        assert two["rank"] == 0.5 and one["rank"] == 0
        assert two["loss_a"] == pytest.approx(one["loss_a"], rel=1e-4)
    with pytest.raises(ValueError, match="processes: 2 -> 1"):
        Loop(pair, steps=9, state={"model": nn.Linear(1, 1), "optimizer": nn.Linear(1, 1)}, resume=True)
    # A finished training has nothing left that depends on their number.
    model = torch.nn.Module()
    model.conv, model.norm, model.drop = nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.Dropout(0.0)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    read = Loop(pair, steps=8, state={"model": model, "optimizer": optimizer}, resume=True)
    assert read.start == 8
    assert all(torch.equal(value, ranks[0][name]) for name, value in model.state_dict().items())


def test_alone_everything_is_plain(monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    with distributed.process_group(torch.device("cpu")):
        assert not distributed.active() and distributed.is_main()
        assert distributed.rank() == 0 and distributed.world_size() == 1
        assert distributed.gather_objects({"a": 1}) == [{"a": 1}]
        assert distributed.mean_over_ranks({"a": 2.0}) == {"a": 2.0}
        distributed.barrier()
        model = nn.BatchNorm2d(3)
        assert distributed.sync_batch_norm(model, torch.device("cpu")) is model
        assert isinstance(distributed.wrap(model, torch.device("cpu")), distributed.LossModule)


def test_local_device():
    with pytest.raises(ValueError, match="device must be cpu, cuda or such as cuda:0, got 'foo'"):
        distributed.local_device("foo")
    assert distributed.local_device("cpu") == torch.device("cpu")
    if not torch.cuda.is_available():
        assert distributed.local_device() == torch.device("cpu")
        with pytest.raises(ValueError, match="device must be one that is here, got cuda"):
            distributed.local_device("cuda")
