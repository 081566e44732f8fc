"""Images in tar files by class: a tar for each class, a tar of class folders, or a tar of tars."""

from pathlib import Path

from lkd.data.dataset import Dataset
from lkd.data.image_files import LoadingOptions
from lkd.data.image_folder import SUFFIXES
from lkd.data.labelled_sources import LabelledSource, build_dataset, check_root, number_classes
from lkd.data.tar_files import Member, TarSource, index_tar
from lkd.errors import UserError

LAYOUT = "train.tar and val.tar (of CLASS/ folders, or of CLASS.tar files), or train/CLASS.tar and val/CLASS.tar"


def load_class_tars(root: str | None, loading: LoadingOptions) -> Dataset:
    """Find the images; an image's class is the folder or the tar that it lies in.

    Args:
        root: The folder that holds `LAYOUT`.
        loading: How images are loaded.

    Raises:
        UserError: If the folder is missing or laid out otherwise, an image lies in no class, or a class has no training
            images.
    """
    root = check_root(root, LAYOUT)
    (train, train_names), (val, val_names) = (find_images(Path(root), part) for part in ("train", "val"))
    classes = tuple(sorted(set(train_names)))
    parts = [
        LabelledSource(source, number_classes(names, classes, f"{root}: {part}"))
        for part, source, names in (("train", train, train_names), ("val", val, val_names))
    ]
    return build_dataset("tar", parts, classes, loading, root)


def find_images(root: Path, part: str) -> tuple[TarSource, list[str]]:
    """The images of one part and their classes' names, sorted by class and name.

    Raises:
        UserError: If there are no tars, or an image lies in no class.
    """
    whole = root / f"{part}.tar"
    paths = [whole] if whole.is_file() else sorted((root / part).glob("*.tar"))
    if not paths:
        raise UserError(f"data.root: {str(root)!r} holds neither {part}.tar nor {part}/CLASS.tar; expected {LAYOUT}")
    found: list[tuple[str, int, Member]] = []
    for number, path in enumerate(paths):
        for member in index_tar(path):
            if member.name.lower().endswith(SUFFIXES):
                name = Path(member.name).parent.name or ("" if path == whole else path.stem)
                if not name:
                    raise UserError(f"data.root: {path}: {member.name} lies in no class folder; expected {LAYOUT}")
                found.append((name, number, member))
    found.sort(key=lambda entry: (entry[0], entry[2].name))
    return TarSource(paths, [(number, member) for _, number, member in found]), [name for name, _, _ in found]
