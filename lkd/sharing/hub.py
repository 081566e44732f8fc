"""Files on the Hugging Face Hub."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lkd.errors import UserError
from lkd.sharing.references import HubReference


def download(reference: HubReference) -> Path:
    """Download a file into the Hub's cache.

    Raises:
        UserError: If it is not there, is private to others, or the Hub does not answer.
    """
    from huggingface_hub import HfApi

    with explained(reference):
        api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"))
        return Path(api.hf_hub_download(reference.repository, reference.file, revision=reference.revision))


def upload(path: Path, reference: HubReference, card: str, private: bool) -> str:
    """Put a file and its model card into a repository, which is made if it is not there, as one commit.

    Args:
        path: The file.
        reference: Where to; its revision must be there already.
        card: README.md of the repository.
        private: Of a new repository, whether others cannot see it.

    Returns:
        The commit's address.

    Raises:
        UserError: If nobody is logged in, the repository is not theirs, or the Hub does not answer.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    with explained(reference):
        api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"))
        api.create_repo(reference.repository, private=private, exist_ok=True)
        commit = api.create_commit(
            reference.repository,
            [CommitOperationAdd(reference.file, path), CommitOperationAdd("README.md", card.encode())],
            commit_message=f"{reference.file}, by lkd push",
            revision=reference.revision,
        )
    return str(commit.commit_url)


@contextmanager
def explained(reference: HubReference) -> Iterator[None]:
    """Turn the Hub's errors into one line each."""
    from huggingface_hub import errors

    name = f"hf://{reference.repository}"
    try:
        yield
    except (errors.GatedRepoError, errors.RepositoryNotFoundError) as error:
        raise UserError(f"{name}: no such repository, or it is not yours to see; log in by `hf auth login`") from error
    except errors.RevisionNotFoundError as error:
        raise UserError(f"{name}: has no revision {reference.revision!r}") from error
    except errors.LocalEntryNotFoundError as error:
        raise UserError(f"{name}: the Hub cannot be reached, and the file is not in its cache") from error
    except errors.EntryNotFoundError as error:
        raise UserError(f"{name}: has no file {reference.file!r}") from error
    except errors.LocalTokenNotFoundError as error:
        raise UserError(f"{name}: nobody is logged in; run `hf auth login`") from error
    except Exception as error:  # of the client's own network library, which is not the same in all versions
        raise UserError(f"{name}: {(str(error).splitlines() or [type(error).__name__])[0]}") from error
