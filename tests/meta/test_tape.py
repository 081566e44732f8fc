import pytest
import torch
from bilevel_problems import relative_distance
from torch import nn
from torch.nn import functional as F

from meta import Problem, State, Tape, call_module
from meta.estimators import first_order
from meta.optim import SGD, AdamW, from_torch, read_slots


class Student(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Softplus(), nn.Dropout(0.3))
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.body(x))


def weighted_loss(logits, targets, weights):
    return (weights.exp() * F.cross_entropy(logits, targets, reduction="none")).mean()


@pytest.mark.parametrize(
    ("kind", "functional"),
    [
        (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01), SGD(0.1, 0.9, weight_decay=0.01)),
        (lambda p: torch.optim.AdamW(p, lr=0.01), AdamW(0.01)),
    ],
)
def test_the_tape_of_a_real_loop_equals_the_estimator(kind, functional):
    torch.manual_seed(0)
    student = Student().double()
    weights = nn.Parameter(torch.zeros(5, dtype=torch.float64))
    batches = [(torch.randn(5, 6, dtype=torch.float64), torch.randint(3, (5,))) for _ in range(5)]
    optimizer = kind(student.parameters())

    def inner_loss(parameters, buffers, hyper, batch):
        logits, buffers = call_module(student, parameters, buffers, batch[0])
        return weighted_loss(logits, batch[1], hyper["weights"]), buffers

    def outer_loss(parameters, buffers, batch):
        with torch.random.fork_rng():
            torch.manual_seed(7)
            return F.cross_entropy(call_module(student, parameters, buffers, batch[0])[0], batch[1])

    tape = Tape(student, optimizer, {"weights": weights}, steps=3)
    for index, batch in enumerate(batches[:4]):
        if index == 1:
            state = State(
                {name: p.detach().clone() for name, p in student.named_parameters()},
                {name: b.clone() for name, b in student.named_buffers()},
                read_slots(optimizer, student),
            )
            generators = torch.get_rng_state()
        tape.watch(batch)
        optimizer.zero_grad()
        weighted_loss(student(batch[0]), batch[1], weights).backward()
        optimizer.step()
    taped = tape.hypergradient(inner_loss, outer_loss, batches[4], radius=1e-3)

    torch.set_rng_state(generators)
    problem = Problem(inner_loss, outer_loss, state, {"weights": weights}, batches[1:4], batches[4], functional)
    expected = first_order(problem, radius=1e-3)
    assert relative_distance(taped.grads, expected.grads) < 1e-8
    assert relative_distance(taped.final_state.parameters, expected.final_state.parameters) < 1e-10
    tape.close()
    optimizer.step()


def test_what_the_optimizer_does_not_step_is_held_constant():
    """Though it has gradients, which nobody clears."""
    torch.manual_seed(0)
    student = Student().double().eval()
    weights = nn.Parameter(torch.zeros(5, dtype=torch.float64))
    batches = [(torch.randn(5, 6, dtype=torch.float64), torch.randint(3, (5,))) for _ in range(4)]
    start = State({f"head.{n}": p.detach().clone() for n, p in student.head.named_parameters()}, {}, {})

    def inner_loss(parameters, buffers, hyper, batch):
        logits, buffers = call_module(student, parameters, buffers, batch[0])
        return weighted_loss(logits, batch[1], hyper["weights"]), buffers

    def outer_loss(parameters, buffers, batch):
        return F.cross_entropy(call_module(student, parameters, buffers, batch[0])[0], batch[1])

    optimizer = torch.optim.SGD(student.head.parameters(), lr=0.1)
    tape = Tape(student, optimizer, {"weights": weights}, steps=3)
    for batch in batches[:3]:
        tape.watch(batch)
        optimizer.zero_grad()
        weighted_loss(student(batch[0]), batch[1], weights).backward()
        optimizer.step()
    taped = tape.hypergradient(inner_loss, outer_loss, batches[3])
    problem = Problem(inner_loss, outer_loss, start, {"weights": weights}, batches[:3], batches[3], SGD(0.1))
    assert relative_distance(taped.grads, first_order(problem).grads) < 1e-8


def test_an_empty_tape_and_an_unknown_optimizer_are_errors():
    student = Student()
    with pytest.raises(ValueError, match="unsupported inner optimiser Adagrad"):
        Tape(student, torch.optim.Adagrad(student.parameters()), {}, steps=2)
    with pytest.raises(ValueError, match=r"SGD.*is no optimiser"):
        Tape(student, torch.optim.SGD, {}, steps=2)
    tape = Tape(student, torch.optim.SGD(student.parameters(), lr=0.1), {}, steps=2)
    with pytest.raises(ValueError, match="tape is empty"):
        tape.hypergradient(lambda *a: None, lambda *a: None, None)


def test_parameter_groups_are_converted():
    student = Student()
    groups = [
        {"params": student.body.parameters(), "lr": 0.1},
        {"params": student.head.parameters(), "lr": 0.2, "momentum": 0.5},
    ]
    grouped = from_torch(torch.optim.SGD(groups, lr=0.3), student)
    assert grouped.select("body.0.weight") == SGD(0.1)
    assert grouped.select("head.bias") == SGD(0.2, momentum=0.5)
    with pytest.raises(ValueError, match="amsgrad"):
        from_torch(torch.optim.Adam(student.parameters(), amsgrad=True), student)
