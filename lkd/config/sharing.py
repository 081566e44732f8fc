"""The recipes of sharing a learned loss."""

from dataclasses import dataclass


@dataclass
class PushRecipe:
    """Put a learned loss on the Hugging Face Hub, with a model card, or into W&B's artifacts.

    Args:
        loss: The file.
        to: hf://OWNER/REPOSITORY[@REVISION][/FILE] or wandb://ENTITY/PROJECT/ARTIFACT[:ALIAS].
        private: Of a new repository on the Hub, whether others cannot see it.
        card: Only write the model card to this file; nothing is sent.
    """

    loss: str
    to: str
    private: bool = False
    card: str | None = None


@dataclass
class PullRecipe:
    """Fetch a learned loss from the Hugging Face Hub or from W&B's artifacts, and check it.

    Args:
        loss: hf://OWNER/REPOSITORY[@REVISION][/FILE] or wandb://ENTITY/PROJECT/ARTIFACT[:VERSION]. Other commands take
            such a name in the place of a file, too.
        out: The file to write.
    """

    loss: str
    out: str = "loss.lkd.safetensors"
