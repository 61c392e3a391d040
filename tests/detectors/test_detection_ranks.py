"""Two processes over gloo: synchronised batch norm on the CPU, and losses that equal one process's."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

WORKER = """
import sys
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from nasdet.detectors import build_fcos
from nasdet.detectors.norm import SyncBatchNorm

rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
data = torch.load(f"{folder}/data.pt", weights_only=True)
torch.manual_seed(0)

norm = SyncBatchNorm(4)
x = data["maps"][:3] if rank == 0 else data["maps"][3:]  # 3 samples here, 1 there
x = x.clone().requires_grad_()
y = norm(x)
(y.sin() * 2).sum().backward()
result = {"y": y.detach(), "dx": x.grad, "dw": norm.weight.grad.clone()}
result |= {"mean": norm.running_mean.clone(), "var": norm.running_var.clone()}

norm.zero_grad()
before = {name: value.clone() for name, value in norm.state_dict().items()}
x = torch.zeros(0, 4, 14, 14, requires_grad=True)  # the masks of pictures without objects, on both ranks
y = norm(x)
y.sum().backward()
result["nothing"] = {"before": before, "after": {name: value.clone() for name, value in norm.state_dict().items()}}
result["nothing"] |= {"y": y.detach(), "dx": x.grad, "dw": norm.weight.grad, "db": norm.bias.grad}
sparse = SyncBatchNorm(4)
y = sparse(data["maps"][: 4 * rank])  # none here, all 4 there
result["sparse"] = {"y": y.detach(), "mean": sparse.running_mean, "var": sparse.running_var}

model = build_fcos("resnet18", 5, width=0.125, fpn_channels=16, tower_convs=1, levels=3)
wrapped = DistributedDataParallel(model)
losses = model.loss(wrapped(data["images"][rank : rank + 1]), [data["targets"][rank]])
sum(losses.values()).backward()
result["gradients"] = {name: p.grad for name, p in model.named_parameters()}
torch.save(result, f"{folder}/result{rank}.pt")
dist.barrier()
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, list[dict]]:
    if not (dist.is_available() and dist.is_gloo_available()):
        pytest.skip("this torch has no gloo")
    folder: Path = tmp_path_factory.mktemp("ranks")
    torch.manual_seed(1)
    data = {
        "maps": torch.randn(4, 4, 5, 6) * 3 + 1000,
        "images": torch.rand(2, 3, 64, 64),
        "targets": [
            {"boxes": torch.tensor([[4.0, 6, 40, 50], [30, 10, 60, 60]]), "labels": torch.tensor([1, 4])},
            {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)},
        ],
    }
    torch.save(data, folder / "data.pt")
    (folder / "worker.py").write_text(WORKER)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(folder / "worker.py")]
    workers = [
        subprocess.Popen([*command, str(rank), str(folder)], env=environment, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    try:
        errors = [worker.communicate(timeout=100)[1] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0, 0], "\n".join(errors)
    return data, [torch.load(folder / f"result{rank}.pt", weights_only=True) for rank in range(2)]


def test_sync_batch_norm_on_the_cpu_is_batch_norm_over_all(two_ranks: tuple[dict, list[dict]]) -> None:
    data, results = two_ranks
    norm = torch.nn.BatchNorm2d(4)
    x = data["maps"].clone().requires_grad_()
    y = norm(x)
    (y.sin() * 2).sum().backward()
    assert x.grad is not None and norm.weight.grad is not None
    torch.testing.assert_close(torch.cat([r["y"] for r in results]), y.detach(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.cat([r["dx"] for r in results]), x.grad, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(results[0]["dw"] + results[1]["dw"], norm.weight.grad, rtol=1e-3, atol=1e-3)
    for result in results:
        torch.testing.assert_close(result["mean"], norm.running_mean)
        torch.testing.assert_close(result["var"], norm.running_var, rtol=1e-4, atol=1e-4)


def test_sync_batch_norm_of_no_samples_on_any_rank_changes_nothing(two_ranks: tuple[dict, list[dict]]) -> None:
    for result in two_ranks[1]:
        nothing = result["nothing"]
        assert nothing["y"].shape == nothing["dx"].shape == (0, 4, 14, 14)
        assert all(torch.equal(value, nothing["before"][name]) for name, value in nothing["after"].items())
        assert bool(nothing["before"]["running_mean"].any())
        for gradient in (nothing["dw"], nothing["db"]):
            assert torch.equal(gradient, torch.zeros(4))


def test_sync_batch_norm_of_samples_on_one_rank_alone(two_ranks: tuple[dict, list[dict]]) -> None:
    data, results = two_ranks
    norm = torch.nn.BatchNorm2d(4)
    y = norm(data["maps"])
    assert results[0]["sparse"]["y"].shape == (0, *y.shape[1:])
    torch.testing.assert_close(results[1]["sparse"]["y"], y.detach(), rtol=1e-4, atol=1e-4)
    for result in results:
        torch.testing.assert_close(result["sparse"]["mean"], norm.running_mean)
        torch.testing.assert_close(result["sparse"]["var"], norm.running_var, rtol=1e-4, atol=1e-4)


def test_gradients_of_two_ranks_are_those_of_one_process(two_ranks: tuple[dict, list[dict]]) -> None:
    from nasdet.detectors import build_fcos

    data, results = two_ranks
    torch.manual_seed(0)
    model = build_fcos("resnet18", 5, width=0.125, fpn_channels=16, tower_convs=1, levels=3)
    losses = model.loss(model(data["images"]), data["targets"])
    torch.stack(list(losses.values())).sum().backward()
    for name, parameter in model.named_parameters():
        assert torch.equal(results[0]["gradients"][name], results[1]["gradients"][name]), name
        torch.testing.assert_close(results[0]["gradients"][name], parameter.grad, rtol=1e-3, atol=1e-4)
