"""The formats of `lkd export`: each writes one file, and gives the function from images to logits that the file is."""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lkd.errors import UserError
from lkd.files import replaced_atomically
from lkd.models.build import OWN_NETWORKS, plain_state_dict

Compute = Callable[[Tensor], Tensor]
Written = tuple[Path, Compute]


class Logits(nn.Module):
    """A network as others know networks: from images to logits."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        """Compute the logits [B, C] of normalised images [B, C, H, W]."""
        logits: Tensor = self.network(images).logits
        return logits


def write_timm(model: nn.Module, architecture: dict[str, Any], images: Tensor, folder: Path) -> Written:
    """A state dict that `timm.create_model(name, checkpoint_path=...)` loads.

    Raises:
        UserError: If the network is not one of timm's.
    """
    name = architecture["name"]
    if name in OWN_NETWORKS:
        raise UserError(f"formats: timm has no {name}; take safetensors, onnx or torch_export")
    import timm

    path = folder / "student.pth"
    with replaced_atomically(path) as temporary:
        torch.save(copy_state(model), temporary)
    kept = {key: architecture[key] for key in ("num_classes", "in_chans")}
    read = timm.create_model(name, checkpoint_path=str(path), **kept, **(architecture.get("options") or {})).eval()
    return path, torch.no_grad()(read)


def write_safetensors(model: nn.Module, architecture: dict[str, Any], images: Tensor, folder: Path) -> Written:
    """The plain state dict under its library's own names, without a header of ours."""
    from safetensors.torch import load_file, save_file

    from lkd.models import build

    path = folder / "student.safetensors"
    with replaced_atomically(path) as temporary:
        save_file(copy_state(model), temporary)
    network = build(**architecture)
    getattr(network, "model", network).load_state_dict(load_file(path))
    return path, torch.no_grad()(Logits(network).eval())


def write_onnx(model: nn.Module, architecture: dict[str, Any], images: Tensor, folder: Path) -> Written:
    """ONNX with inputs `images` [batch, C, H, W] and output `logits`; any batch size.

    Raises:
        UserError: If the packages of the `export` extra are missing.
    """
    runtime = import_extra("onnxruntime")
    import_extra("onnxscript")
    path = folder / "student.onnx"
    batch = torch.export.Dim("batch")
    program = torch.onnx.export(
        model,
        (images,),
        dynamo=True,
        input_names=["images"],
        output_names=["logits"],
        dynamic_shapes=({0: batch},),
        verbose=False,
    )
    assert program is not None  # it is with dynamo
    with replaced_atomically(path) as temporary:
        program.save(str(temporary), external_data=False)
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return path, lambda pixels: torch.from_numpy(session.run(["logits"], {"images": pixels.numpy()})[0])


def write_torch_export(model: nn.Module, architecture: dict[str, Any], images: Tensor, folder: Path) -> Written:
    """A `torch.export` program for any batch size; `torch.export.load(path).module()` runs it."""
    path = folder / "student.pt2"
    program = torch.export.export(model, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    with replaced_atomically(path) as temporary:
        torch.export.save(program, temporary)
    return path, torch.no_grad()(torch.export.load(path).module())


def copy_state(model: nn.Module) -> dict[str, Tensor]:
    """The network's weights under its library's own names."""
    network: Any = model.network
    return {name: tensor.detach().cpu().contiguous() for name, tensor in plain_state_dict(network).items()}


def import_extra(package: str) -> Any:
    """Import a package of the `export` extra.

    Raises:
        UserError: If it is not installed.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise UserError(f"formats: onnx needs {package}; pip install 'lkd[export]'") from error


FORMATS: dict[str, Callable[[nn.Module, dict[str, Any], Tensor, Path], Written]] = {
    "timm": write_timm,
    "safetensors": write_safetensors,
    "onnx": write_onnx,
    "torch_export": write_torch_export,
}
