"""What a trained network says of pictures: `lkd predict`."""

import csv
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from lkd.config.training import PredictRecipe
from lkd.core.errors import UserError, explaining_exhaustion
from lkd.data.augment import cut_center
from lkd.data.image_files import DamagedImageError, LoadingOptions, decode, is_hidden
from lkd.data.readers import IN_MEMORY, FashionMNIST
from lkd.data.sources import MEAN, STD, SUFFIXES
from lkd.models.build import try_black_image, unwrap
from lkd.models.teacher import load_teacher_network
from lkd.tracking.run import choose_device

LUMA = (0.299, 0.587, 0.114)  # of red, green and blue in grey, as Pillow has it


class Prediction(NamedTuple):
    """The most probable classes of a picture, by name, the most probable first."""

    picture: str
    classes: list[str]
    probabilities: list[float]


class Input(NamedTuple):
    """How pictures are prepared for a network, and its classes' names."""

    shape: tuple[int, int, int]  # channels, height, width
    mean: Sequence[float]
    std: Sequence[float]
    crop: float  # size over the shorter side that a picture is scaled to; its centre is cut out
    classes: Sequence[str]


@torch.no_grad()
def predict(recipe: PredictRecipe, say: Any) -> Iterator[Prediction]:
    """Classify pictures; `say` is told of those that cannot be read, which are left out."""
    pictures = list_pictures(recipe.pictures)
    device = choose_device(recipe.device)
    network, header = load_teacher_network(recipe.checkpoint, recipe.name, recipe.options)
    wanted = read_input(network, header, recipe)
    if "input" not in header:
        how = f"mean {list(wanted.mean)} and std {list(wanted.std)}"
        say(f"{recipe.checkpoint}: pictures are normalised by {how}, since the file does not say how")
    try_black_image(network, recipe.checkpoint, wanted.shape)
    mean, std = (torch.tensor(values, device=device).view(-1, 1, 1) for values in (wanted.mean, wanted.std))
    network, count = network.to(device), 0
    for first in range(0, len(pictures), recipe.batch_size):
        names, pixels = [], []
        for path in pictures[first : first + recipe.batch_size]:
            try:
                pixels.append(prepare_picture(path, wanted))
                names.append(str(path))
            except DamagedImageError as error:
                say(f"warning: {error}; left out")
        if not names:
            continue
        with explaining_exhaustion("predict", "a smaller batch_size"):
            logits = network((torch.stack(pixels).to(device).float() / 255 - mean) / std).logits.float()
        if not bool(logits.isfinite().all()):
            raise UserError(f"{recipe.checkpoint}: its answers are not finite: the training has diverged")
        best = logits.softmax(1).topk(min(recipe.top_k, logits.shape[1]))
        for name, places, values in zip(names, best.indices.tolist(), best.values.tolist(), strict=True):
            yield Prediction(name, [wanted.classes[place] for place in places], values)
        count += len(names)
    if not count:
        raise UserError(f"pictures: none of {len(pictures)} can be read")


def list_pictures(named: Iterable[str]) -> list[Path]:
    """The pictures that are named, and those in the folders that are."""
    found: list[Path] = []
    for name in named:
        path = Path(name).expanduser()
        if path.is_dir():
            inside = (file.relative_to(path) for file in sorted(path.rglob("*")) if file.suffix.lower() in SUFFIXES)
            found += [path / file for file in inside if not is_hidden(file.as_posix())]
        elif path.is_file():
            found.append(path)
        else:
            raise UserError(f"pictures: {name}: no such file or folder")
    if not found:
        raise UserError(f"pictures: none; name files or folders of {', '.join(SUFFIXES)}")
    return found


def read_input(network: torch.nn.Module, header: dict[str, Any], recipe: PredictRecipe) -> Input:
    """How pictures are prepared: what the file says, or else what is known of its data set, or of timm's network."""
    architecture, provenance = header["architecture"], header["provenance"]
    channels, count = architecture["in_chans"], architecture["num_classes"]
    if channels not in (1, 3):
        raise UserError(f"{recipe.checkpoint}: takes images of {channels} channels; pictures are read with 1 or 3")
    data = ((provenance.get("recipe") or {}).get("data") or {}).get("name", "")
    timms: dict[str, Any] = getattr(unwrap(network), "pretrained_cfg", None) or {}
    known = IN_MEMORY.get("fashion_mnist" if data in ("embedded", *FASHION) else data)
    own = header.get("input") or (timms if not provenance else {})
    statistics: list[Sequence[float]] = [own.get("mean", known.mean if known else MEAN)]
    statistics.append(own.get("std", known.std if known else STD))
    if len(statistics[0]) != channels:  # of colours, for grey pictures
        statistics = [[sum(values) / len(values)] * channels for values in statistics]
    mean, std = statistics
    shape = (
        own.get("input_size") or provenance.get("image_shape") or ([channels, 28, 28] if known else [channels, 0, 0])
    )
    if recipe.image_size:
        shape = [channels, recipe.image_size, recipe.image_size]
    if min(shape) < 1:
        raise UserError(f"image_size: {recipe.checkpoint} does not say which images it was trained on; give their size")
    classes = header.get("classes") or (FashionMNIST.classes if known and count == 10 and channels == 1 else None)
    crop = own.get("crop_pct") or (1.0 if known else LoadingOptions().crop_pct)
    return Input((channels, *shape[1:]), mean, std, crop, classes or [str(number) for number in range(count)])


FASHION = ("fashion_mnist_rest", "fashion_mnist_unseen")


def prepare_picture(path: Path, wanted: Input) -> Tensor:
    """Decode a picture and cut its centre out: uint8, [C, H, W].

    Raises:
        DamagedImageError: If it cannot be read.
    """
    channels, height, width = wanted.shape
    try:
        image = decode(torch.from_numpy(np.fromfile(path, np.uint8)), str(path))
    except OSError as error:
        raise DamagedImageError(f"{path}: cannot be read ({error.strerror})") from error
    if channels == 1:
        image = (torch.tensor(LUMA).view(3, 1, 1) * image).sum(0, keepdim=True).round().to(torch.uint8)
    if height != width:
        return interpolate(image[None], (height, width), mode="bilinear", antialias=True)[0]
    return cut_center(image, height, round(height / wanted.crop))


def format_prediction(prediction: Prediction) -> str:
    """One line."""
    pairs = zip(prediction.classes, prediction.probabilities, strict=True)
    return f"{prediction.picture}: " + ", ".join(f"{name} {100 * value:.1f} %" for name, value in pairs)


def write_csv(predictions: Iterable[Prediction], file: TextIO) -> int:
    """Write a row a picture: its path, and of each of its classes name and probability. How many there were."""
    writer, count = csv.writer(file), 0
    for count, each in enumerate(predictions, 1):
        if count == 1:
            columns = [
                f"{what}_{place}" for place in range(1, len(each.classes) + 1) for what in ("class", "probability")
            ]
            writer.writerow(["picture", *columns])
        pairs = zip(each.classes, each.probabilities, strict=True)
        writer.writerow([each.picture, *(part for name, value in pairs for part in (name, f"{value:.6f}"))])
    return count
