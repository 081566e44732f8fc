"""What can be wrong with a bi-level problem, said in one clear line."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from meta.problem import Problem
from meta.tensors import Tensors


class NotTwiceDifferentiableError(ValueError):
    """An operation of the inner loss has no second derivative."""


def check_inputs(problem: Problem, needs_hyper: bool = True) -> None:
    """Check, before anything is computed, all that the inputs alone can tell.

    Args:
        problem: The problem.
        needs_hyper: Whether there must be outer parameters.

    Raises:
        ValueError: No inner step, no outer parameter, a tensor that cannot be differentiated, or trees that do not
            match.
    """
    state, hyper = problem.state, problem.hyper
    if len(problem.inner_batches) == 0:
        raise ValueError("a rollout needs at least one inner batch (K = 0 has no hypergradient)")
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


def check_scalar(kind: str, loss: Tensor) -> None:
    """Check that a loss is a scalar that autograd can differentiate.

    Raises:
        ValueError: It is not zero-dimensional, or it is detached from every graph.
    """
    if loss.dim() != 0:
        raise ValueError(f"the {kind} loss must be a scalar, but has shape {tuple(loss.shape)}")
    if not loss.requires_grad:
        raise ValueError(
            f"the {kind} loss does not depend on the inner parameters it was given (is it detached, or computed with a "
            "module's own parameters?)"
        )


def check_used(unused: Iterable[str]) -> None:
    """Raise a ValueError that names the outer parameters that neither the inner loss nor the optimiser used, if any."""
    if unused := list(unused):
        raise ValueError(f"outer parameters that the inner loss never uses: {_listing(unused)}")


def find_unused(losses: Sequence[Tensor], leaves: Tensors) -> list[str]:
    """Name the `leaves` that no loss depends on, by searching the losses' graphs; nothing is computed."""
    missing = {id(leaf): name for name, leaf in leaves.items()}
    for node in _search([loss.grad_fn for loss in losses] if missing else []):
        missing.pop(id(getattr(node, "variable", None)), None)
        if not missing:
            break
    return list(missing.values())


def check_twice_differentiable(gradients: Iterable[Tensor | None]) -> None:
    """Check, by searching the graph of first-order gradients, that they can be differentiated again.

    Raises:
        NotTwiceDifferentiableError: An operation has no second derivative; the message names it.
    """
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
