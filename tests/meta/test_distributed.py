"""The outer step of two gloo processes equals the one of a single process that has all the students."""

import torch
import torch.distributed as dist
from torch import nn

from meta import Hypergradient, State, outer_step
from tests.processes import FORK


def draw(student: int) -> Hypergradient:
    generator = torch.Generator().manual_seed(student)
    grads = {name: torch.randn(shape, generator=generator) for name, shape in {"weight": (3, 2), "bias": (3,)}.items()}
    if student == 2:
        grads["bias"][0] = float("nan")
    return Hypergradient(torch.tensor(float(student)), grads, State({}, {}, {}), torch.tensor(1.0))


def step(students: list[int]) -> tuple[torch.Tensor, float, float]:
    parameters = {"weight": nn.Parameter(torch.ones(3, 2)), "bias": nn.Parameter(torch.ones(3))}
    optimizer = torch.optim.SGD(parameters.values(), lr=0.5)
    done = outer_step([draw(student) for student in students], parameters, optimizer, clip_norm=1.0)
    return torch.cat([parameter.detach().flatten() for parameter in parameters.values()]), done.value, done.norm


def work(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    torch.save(step([0, 1] if rank == 0 else [2, 3]), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_equal_one(tmp_path):
    processes = [FORK.Process(target=work, args=(rank, str(tmp_path))) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    parameters, value, norm = step([0, 1, 2, 3])
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        torch.testing.assert_close(found[0], parameters)
        assert found[1] == value
        assert abs(found[2] - norm) < 1e-6
