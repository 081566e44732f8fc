"""`lkd push` and `lkd pull`."""

import shutil
from pathlib import Path

from lkd.artifact import load_loss, read_provenance
from lkd.config import PullRecipe, PushRecipe
from lkd.files import replaced_atomically, write_text
from lkd.sharing.hub import upload
from lkd.sharing.model_card import describe_training, write_card
from lkd.sharing.references import HubReference, fetch, parse_reference
from lkd.sharing.wandb_artifacts import upload_artifact


def push_loss(recipe: PushRecipe) -> str:
    """Send a learned loss.

    Returns:
        Where it is, or the file of its card.

    Raises:
        UserError: If the file is no learned loss, the name has no known form, or it cannot be sent.
    """
    path, reference = Path(recipe.loss), parse_reference(recipe.to)
    load_loss(path)  # what cannot be loaded is not sent
    card = write_card(path, recipe.to)
    if recipe.card:
        write_text(Path(recipe.card), card)
        return recipe.card
    if isinstance(reference, HubReference):
        return upload(path, reference, card, recipe.private)
    return upload_artifact(path, reference, "loss", describe_training(read_provenance(path)))


def pull_loss(recipe: PullRecipe) -> Path:
    """Fetch a learned loss and check it.

    Returns:
        The file.

    Raises:
        UserError: If it cannot be had, is no learned loss, or the file cannot be written.
    """
    found = fetch(recipe.loss)
    load_loss(found)
    with replaced_atomically(Path(recipe.out)) as temporary:
        shutil.copyfile(found, temporary)
    return Path(recipe.out)
