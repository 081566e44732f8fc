"""What can be wrong with a bi-level problem, said in one clear line."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from meta.problem import Problem
from meta.tensors import State, Tensors


class NotTwiceDifferentiableError(ValueError):
    """An operation of the inner loss has no second derivative."""


class UnusedError(ValueError):
    """Outer parameters that neither the inner loss nor the optimiser uses.

    Attributes:
        names: Their names.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self.names = sorted(names)
        super().__init__(f"outer parameters that the inner loss never uses: {_listing(self.names)}")


def check_inputs(problem: Problem, needs_hyper: bool = True) -> None:
    """Check, before anything is computed, all that the inputs alone can tell.

    `needs_hyper`: whether there must be outer parameters.
    """
    state, hyper, batches = problem.state, problem.hyper, problem.inner_batches
    if not isinstance(batches, Sequence | Tensor):
        raise ValueError(
            f"inner_batches is a {type(batches).__name__}: give a list of K batches, such as "
            "list(itertools.islice(loader, K))"
        )
    if len(batches) == 0:
        raise ValueError("a rollout needs at least one inner batch (K = 0 has no hypergradient)")
    if not isinstance(state, State):
        raise ValueError(f"state is a {type(state).__name__}: give State(parameters, buffers, optimizer)")
    slots = {f"optimiser slot {slot!r}": tensors for slot, tensors in state.optimizer.items()}
    trees = {"inner parameter": state.parameters, "buffer": state.buffers, "outer parameter": hyper, **slots}
    for kind, tensors in trees.items():
        if not isinstance(tensors, Mapping):
            raise ValueError(f"the {kind}s are a {type(tensors).__name__}: give a dict, name → tensor")
        for name, value in tensors.items():
            if not isinstance(value, Tensor):
                raise ValueError(f"{kind} {name!r} is a {type(value).__name__}: make it a tensor, torch.tensor(value)")
    if torch.is_inference_mode_enabled():
        raise ValueError("torch.inference_mode() is on, and nothing can be differentiated in it: leave it")
    for kind, leaves in (*trees.items(), ("inner batch", batches), ("outer batch", problem.outer_batch)):
        if any(isinstance(leaf, Tensor) and leaf.is_inference() for leaf in tree_leaves(leaves)):
            raise ValueError(
                f"a tensor of the {kind} was made under torch.inference_mode(), and autograd takes none: make it under "
                "torch.no_grad(), or clone() it outside"
            )
    groups = [("inner", state.parameters), *([("outer", hyper)] if needs_hyper or hyper else [])]
    for kind, tensors in groups:
        if not tensors:
            raise ValueError(f"there are no {kind} parameters")
        for name, tensor in tensors.items():
            if not tensor.is_floating_point():
                raise ValueError(
                    f"{kind} parameter {name!r} is of type {tensor.dtype}: only floating point can be learned"
                )
    if shared := state.parameters.keys() & state.buffers.keys():
        raise ValueError(f"names of both a parameter and a buffer: {_listing(shared)}")
    for slot, tensors in state.optimizer.items():
        if strangers := tensors.keys() - state.parameters.keys():
            raise ValueError(
                f"the optimiser's slot {slot!r} holds tensors of no inner parameter: {_listing(strangers)}"
            )
        for name, tensor in tensors.items():
            if tensor.dim() and tensor.shape != state.parameters[name].shape:
                raise ValueError(
                    f"the optimiser's slot {slot!r} has shape {tuple(tensor.shape)} for {name!r}, "
                    f"whose shape is {tuple(state.parameters[name].shape)}"
                )


def check_scalar(kind: str, loss: Any) -> None:
    """Check that a loss is a scalar that autograd can differentiate."""
    if not isinstance(loss, Tensor):
        raise ValueError(
            f"the {kind} loss is a {type(loss).__name__}: return a scalar tensor with its graph (no .item())"
        )
    if loss.dim() != 0:
        raise ValueError(f"the {kind} loss must be a scalar, but has shape {tuple(loss.shape)}")
    if not loss.requires_grad:
        raise ValueError(
            f"the {kind} loss does not depend on the inner parameters it was given (is it detached, or computed with a "
            "module's own parameters?)"
        )


def check_differences(problem: Problem, radius: float) -> None:
    """Check that differences of gradients at this radius do not drown in the roundings of the parameters."""
    if not 0 < radius < math.inf:
        raise ValueError(f"radius: {radius} is not a positive number")
    for kind, tensors in (("inner", problem.state.parameters), ("outer", problem.hyper)):
        for name, tensor in tensors.items():
            if torch.finfo(tensor.dtype).eps > 1e-6:
                raise ValueError(
                    f"{kind} parameter {name!r} is of type {tensor.dtype}, too coarse for differences of gradients: "
                    "keep it in float32 and let autocast compute in less, or take the estimator 'adjoint'"
                )


def check_step(before: Tensors, after: Tensors) -> None:
    """Check that a step left every parameter its shape."""
    for name, tensor in after.items():
        if tensor.shape != before[name].shape:
            raise ValueError(
                f"the inner step turns the parameter {name!r} of shape {tuple(before[name].shape)} into one of shape "
                f"{tuple(tensor.shape)}: a learned setting of the optimiser has to be 0-dimensional, or of a shape "
                "that broadcasts to the parameter's"
            )


def find_unused(losses: Sequence[Tensor], leaves: Tensors) -> list[str]:
    """Name the `leaves` that no loss depends on, by searching the losses' graphs; nothing is computed."""
    missing = {id(leaf): name for name, leaf in leaves.items()}
    for node in _search([loss.grad_fn for loss in losses] if missing else []):
        missing.pop(id(getattr(node, "variable", None)), None)
        if not missing:
            break
    return list(missing.values())


def check_twice_differentiable(gradients: Iterable[Tensor | None]) -> None:
    """Check, by searching the graph of first-order gradients, that they can be differentiated again."""
    for node in _search([gradient.grad_fn for gradient in gradients if gradient is not None]):
        if node.name().endswith(("::NotImplemented", "::Error", "CompiledFunctionBackwardBackward")):
            raise NotTwiceDifferentiableError(
                f"the inner loss cannot be differentiated twice: {_reason(node)}. Use the estimator 'first_order', or "
                "do without that operation (fused attention: torch.nn.attention.sdpa_kernel(SDPBackend.MATH) or "
                "timm.layers.set_fused_attn(False); a compiled loss: pass it uncompiled)"
            )


def _search(pending: list[Any]) -> Iterator[Any]:
    """Yield every node of the autograd graphs that end in `pending`, once."""
    seen = set()
    while pending:
        node = pending.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            pending.extend(parent for parent, _ in node.next_functions)


def _reason(node: Any) -> str:
    """Ask a node that has no derivative why: called with as many gradients as it expects, it raises the answer."""
    if "Compiled" in node.name():
        return "torch.compile supports no double backward"
    for count in range(1, 20):
        try:
            node(*[torch.zeros(())] * count)
        except TypeError:
            continue
        except RuntimeError as error:
            return str(error).splitlines()[0]
    return "an operation is differentiable only once"


def _listing(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))
