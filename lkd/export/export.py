"""`lkd export`: a trained student in the formats that others read, each read back and compared; `lkd pack`."""

import importlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lkd.config.training import ExportRecipe, PackRecipe
from lkd.core.errors import UserError, check_choice
from lkd.core.files import read_mapping, refusing_malformed, replaced_atomically, write_json
from lkd.core.tensor_files import digest
from lkd.data.image_files import ImageFiles, LoadingOptions
from lkd.data.packed import pack
from lkd.data.readers import load_dataset
from lkd.models.build import OWN_NETWORKS, plain_state_dict, try_black_image
from lkd.models.files import load_network

# ----------------------------------------------------------------------------------------------------------------------
# The formats of `lkd export`: each writes one file, and gives the function from images to logits that the file is.

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


def is_timms(name: str) -> bool:
    """Whether a network is one of timm's: neither ours, nor registered, nor torchvision's."""
    import timm

    return name not in OWN_NETWORKS and timm.is_model(name.partition(".")[0])


def write_timm(model: nn.Module, architecture: dict[str, Any], images: Tensor, folder: Path) -> Written:
    """A state dict that `timm.create_model(name, checkpoint_path=...)` loads."""
    import timm

    name = architecture["name"]
    if not is_timms(name):
        raise UserError(f"formats: timm has no {name}; take safetensors, onnx or torch_export")

    path = folder / "student.pth"
    with replaced_atomically(path) as temporary:
        torch.save(copy_state(model), temporary)
    kept = {key: architecture[key] for key in ("num_classes", "in_chans")}
    read = timm.create_model(name, checkpoint_path=str(path), **kept, **(architecture.get("options") or {})).eval()
    return path, torch.no_grad()(read)


def write_safetensors(model: nn.Module, architecture: dict[str, Any], images: Tensor, folder: Path) -> Written:
    """The plain state dict under its library's own names, without a header of ours."""
    from safetensors.torch import load_file, save_file

    from lkd.models.build import build

    path = folder / "student.safetensors"
    with replaced_atomically(path) as temporary:
        save_file(copy_state(model), temporary)
    network = build(**architecture)
    getattr(network, "model", network).load_state_dict(load_file(path))
    return path, torch.no_grad()(Logits(network).eval())


def write_onnx(model: nn.Module, architecture: dict[str, Any], images: Tensor, folder: Path) -> Written:
    """ONNX with inputs `images` [batch, C, H, W] and output `logits`; any batch size."""
    runtime = import_extra("onnxruntime")
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
    with replaced_atomically(path) as temporary, temporary.open("wb") as file:  # by name it warns of all but .pt2
        torch.export.save(program, file)
    return path, torch.no_grad()(torch.export.load(path).module())


def copy_state(model: nn.Module) -> dict[str, Tensor]:
    """The network's weights under its library's own names."""
    network: Any = model.network
    return {name: tensor.detach().cpu().contiguous() for name, tensor in plain_state_dict(network).items()}


def import_extra(package: str) -> Any:
    """Import a package of the `export` extra."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise UserError(f"formats: onnx needs {package}: pip install onnx onnxscript onnxruntime") from error


FORMATS: dict[str, Callable[[nn.Module, dict[str, Any], Tensor, Path], Written]] = {
    "timm": write_timm,
    "safetensors": write_safetensors,
    "onnx": write_onnx,
    "torch_export": write_torch_export,
}


BATCH = 4


class Exported(NamedTuple):
    """One file, and the largest difference of a logit of its outputs from the network's, over the largest logit."""

    path: Path
    difference: float


def export(recipe: ExportRecipe) -> dict[str, Exported]:
    """Write every format, read it back, and compare its logits on random images with the network's."""
    for name in recipe.formats:
        check_choice("formats", name, FORMATS)
    if not recipe.formats:
        raise UserError(f"formats: empty; take some of {', '.join(FORMATS)}")
    for package in ("onnxruntime", "onnxscript") if "onnx" in recipe.formats else ():
        import_extra(package)  # before any is written
    folder = Path(recipe.out_dir)
    if (folder / "log.jsonl").exists():
        raise UserError(f"out_dir: {folder} is a run directory, with a config.json of its own; give another folder")
    network, header = load_network(Path(recipe.checkpoint), recipe.name, recipe.options)
    images = draw_images(header, recipe)
    try_black_image(network, recipe.checkpoint, images.shape[1:])
    model = Logits(network).eval()
    weights = digest(copy_state(model))
    kept = find_kept(folder, recipe.formats, weights)
    with torch.no_grad():
        expected = model(images)
    folder.mkdir(parents=True, exist_ok=True)
    written = {}
    for name in recipe.formats:
        path, compute = FORMATS[name](model, header["architecture"], images, folder)
        difference = float((expected - compute(images)).abs().max() / expected.abs().max().clamp_min(1e-12))
        if not difference <= recipe.tolerance:
            raise UserError(
                f"{path}: its logits differ by {difference:.2g} of the largest logit from the network's, more than "
                f"tolerance {recipe.tolerance:g}; do not use this file"
            )
        written[name] = Exported(path, difference)
    shape = list(images.shape[1:])
    rows = {
        name: {"file": each.path.name, "difference": each.difference, "shape": shape} for name, each in written.items()
    }
    said = {"exported": kept | rows, "weights": weights}
    if recipe.image_size and "input" in header:
        header["input"] = header["input"] | {"input_size": shape}
    if (folder / "export.json").is_file():  # what lies beside it is of the network before
        (folder / "config.json").unlink(missing_ok=True)
    write_json(folder / "export.json", {**said, **header})
    write_configuration(header, folder)
    return written


def find_kept(folder: Path, formats: list[str], weights: str) -> dict[str, Any]:
    """What an earlier export of this network left in the folder in other formats, as `export.json` says it.

    That of another network is refused: whoever loads the folder, as timm does, could get it in the place of this one.

    `weights`: a hash of the network's.
    """
    path = folder / "export.json"
    if not path.is_file():
        return {}
    with refusing_malformed(path, "list of exported files"):
        earlier = read_mapping(path)
        others = {name: row for name, row in earlier["exported"].items() if name not in formats}
        kept = {name: row for name, row in others.items() if (folder / row["file"]).is_file()}
    if kept and earlier.get("weights") != weights:
        first = next(iter(kept.values()))["file"]
        raise UserError(f"out_dir: {folder} holds another network, as {first}; give another folder, or delete it")
    return kept


def write_configuration(header: dict[str, Any], folder: Path) -> None:
    """Write `config.json`: timm's `pretrained_cfg`, of a timm network that says how its images are prepared.

    `timm.create_model("local-dir:FOLDER", pretrained=True)` reads it and the weights beside it.
    """
    architecture = header["architecture"]
    if not is_timms(architecture["name"]) or "input" not in header:
        return
    configuration = {
        "architecture": architecture["name"].partition(".")[0],
        "num_classes": architecture["num_classes"],
        **({"label_names": header["classes"]} if "classes" in header else {}),
        "model_args": {"in_chans": architecture["in_chans"], **(architecture.get("options") or {})},
        "pretrained_cfg": {**header["input"], "crop_pct": round_down_crop(header["input"])},
    }
    write_json(folder / "config.json", configuration)


def round_down_crop(prepared: dict[str, Any]) -> float:
    """The `crop_pct` with which timm, which rounds the shorter side down, resizes as we do, to the nearest pixel."""
    size, crop = prepared["input_size"][1], float(prepared["crop_pct"])
    shorter = round(size / crop)
    return crop if math.floor(size / crop) == shorter else size / (shorter + 0.25)


def draw_images(header: dict[str, Any], recipe: ExportRecipe) -> Tensor:
    """Random images of the size that the network was trained on, [BATCH, C, H, W]."""
    channels = header["architecture"]["in_chans"]
    known = header["provenance"].get("image_shape") or header.get("input", {}).get("input_size", [channels, 0, 0])
    height, width = [recipe.image_size] * 2 if recipe.image_size else known[1:]
    if min(height, width) < 1:
        raise UserError(
            f"image_size: {recipe.checkpoint} does not say which images it was trained on; give their height and width"
        )
    return torch.randn(BATCH, channels, height, width, generator=torch.Generator().manual_seed(0))


def pack_dataset(recipe: PackRecipe) -> list[Path]:
    """Pack the training and the test part of a data set into the folder `data.packed`; the index of each."""
    data = recipe.data
    if data.packed is None:
        raise UserError("data.packed: missing; give the folder that the packed images go to")
    dataset = load_dataset(data.name, data.root, LoadingOptions(data.image_size, data.workers, data.damaged_limit))
    indices = []
    for part, images in (("train", dataset.train.images), ("val", dataset.test.images)):
        if not isinstance(images, ImageFiles):
            raise UserError(f"data.name: {data.name} is in memory as it is; only images in files can be packed")
        with tqdm(total=len(images.positions), desc=f"pack {part}", unit="image", disable=None) as bar:
            indices.append(pack(images, Path(data.packed), part, recipe.shorter_side, bar.update))
    return indices
