"""What images a network takes, and what of it cannot be trained: found by dry runs, before any training."""

from typing import Any

import torch
from torch import Tensor, nn

from lkd.core.errors import UserError, explaining_exhaustion, first_line
from lkd.core.files import MALFORMED
from lkd.core.outputs import Outputs
from lkd.models.build import OWN_NETWORKS, REGISTERED, TORCHVISION, build, check_name, running_dry, unwrap

NO_GRADIENT = "no gradient reaches these parameters from the logits: "


def check_trainable(network: nn.Module, role: str, image_shape: tuple[int, int, int], size: int) -> list[str]:
    """Check by a dry run, forward and backward in train mode, that a network can be trained; it stays as it is.

    `role`: what it is, for messages. `size`: images that it sees at a time.

    Returns:
        Lines about what a user may not expect: of several outputs one is trained; and `no gradient: NAME, ...`, which
        parameters the logits do not depend on.
    """
    name = type(unwrap(network)).__name__
    if any(isinstance(module, torch.jit.ScriptModule) for module in network.modules()):
        return []  # nothing of it can be replaced for a while
    trained = {key: parameter for key, parameter in network.named_parameters() if parameter.requires_grad}
    before = {key: parameter.grad for key, parameter in trained.items()}
    modes = [(module, module.training) for module in network.modules()]
    device = next(network.parameters()).device
    try:
        forked = torch.random.fork_rng([device] if device.type == "cuda" else [])
        with explaining_exhaustion(role, "a smaller network"), forked, torch.enable_grad():
            network.train()
            images = torch.zeros(min(size, 2), *image_shape, device=device)
            outputs: Outputs = call_aside(network, images)
            answer = call_aside(unwrap(network), images)
            several = len(answer) if isinstance(answer, tuple | list) and not isinstance(answer, Outputs) else 1
            for parameter in trained.values():
                parameter.grad = None
            if trained:
                outputs.logits.sum().backward()
            unused = [key for key, parameter in trained.items() if parameter.grad is None]
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise UserError(f"{role}: this {name} cannot be trained on such images: {first_line(error)}") from error
        raise UserError(
            f"train.batch_size: BatchNorm of this {name} would see one value of a channel, as {size} image of "
            f"{list(image_shape)} is computed at a time: take a larger batch, less train.accumulation, fewer "
            "processes, or larger images"
        ) from error
    except (*MALFORMED, NotImplementedError) as error:
        raise UserError(f"{role}: this {name} cannot be trained on such images: {first_line(error)}") from error
    finally:
        for module, training in modes:
            module.training = training
        for key, parameter in trained.items():
            parameter.grad = before[key]
    if several > 1 and hasattr(unwrap(network), "head_dist"):
        raise UserError(
            f"{role}: this {name} gives a class head and a distillation head in train mode, which need a loss each: "
            "call its set_distilled_training(False), and the mean of both is trained"
        )
    lines = [f"{role}: of {several} outputs in train mode the logits are trained, the others not"] * (several > 1)
    more = f" and {len(unused) - 5} more" if len(unused) > 5 else ""
    return [*lines, *([f"{NO_GRADIENT}{', '.join(unused[:5])}{more}"] if unused else [])]


def call_aside(network: nn.Module, images: Tensor) -> Any:
    """What a network gives, without a change of its buffers."""
    buffers = {name: buffer.clone() for name, buffer in network.named_buffers()}
    return torch.func.functional_call(network, buffers, (images,))


# ----------------------------------------------------------------------------------------------------------------------
# Networks of a fixed image size.


def find_fixed_size(network: nn.Module, options: dict[str, Any] | None = None) -> int:
    """Height and width of the only images that a network takes; 0 if it takes any."""
    model: Any = unwrap(network)
    configuration, options = getattr(model, "pretrained_cfg", None) or {}, options or {}
    if options.get("dynamic_img_size"):
        return 0
    size = options.get("img_size") or getattr(model, "image_size", 0)  # the latter: torchvision's ViT
    if configuration.get("fixed_input_size"):
        size = size or configuration["input_size"][-1]
    return size if isinstance(size, int) else 0


def fit_image_size(name: str, options: dict[str, Any], image_shape: tuple[int, int, int]) -> dict[str, Any]:
    """Options with which a network of a fixed image size takes these images."""
    import timm

    known = check_name(name)[0]
    if "img_size" in options or known in OWN_NETWORKS or known in REGISTERED or known.startswith(TORCHVISION):
        return options
    configuration, size = timm.get_pretrained_cfg(name, allow_unregistered=True), image_shape[1:]
    if not configuration or not configuration.fixed_input_size or configuration.input_size[1:] == size:
        return options
    parts = name.partition(".")[0].split("_")  # without the tag of its weights
    patch = options.get("patch_size") or next((int(part[5:]) for part in parts if part[:5] == "patch"), 1)
    whole = tuple(patch * -(-side // patch) for side in size)
    fitted: dict[str, Any] = options | {"img_size": size[0] if size[0] == size[1] else list(size)}
    if whole != size:  # its patches would leave out a part of the image, unless it is padded
        fitted |= {"img_size": max(whole), "dynamic_img_size": True, "dynamic_img_pad": True}
    try:
        network = build(name, 2, image_shape[0], options=fitted)
        with running_dry(network):
            network(torch.zeros(1, *image_shape))
    except (UserError, *MALFORMED) as error:
        own = configuration.input_size[-1]
        raise UserError(
            f"model {name!r}: takes images of {own}×{own}, these are {size[0]}×{size[1]} ({first_line(error)}): give "
            f"data.image_size {own} for images in files, options of its own, or another network"
        ) from error
    return fitted
