"""Upload an export to the Hugging Face hub: its own files and nothing else.

The hub's client finds the token by itself (``hf auth login``, or ``HF_TOKEN``). It is not an argument here,
and is in no message.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from storylab.data.hub import check_reachable
from storylab.errors import UserError
from storylab.export.card import CARD
from storylab.export.folder import RECORD, read_export, require_unaltered
from storylab.files import exists, reading, shown
from storylab.tracking.secrets import without_secrets

REPOSITORY = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)
# Answers for a token that is missing, or may not write.
UNAUTHORIZED = (401, 403)


def export_files(folder: Path) -> dict[str, int]:
    """The files of an export, with their sizes in bytes, after a comparison with their hashes.

    Raises:
        UserError: there is no export, or a file is missing, altered or a link.
    """
    record = read_export(folder)
    found = {}
    for name in sorted({*record.files, CARD, RECORD}):
        path = folder / name
        with reading(path):
            if not exists(path) or path.is_symlink():  # a link may lead to anything
                raise UserError(f"{shown(path)} is missing or a link: export the run again")
            found[name] = path.stat().st_size
    require_unaltered(folder, record)
    return found


def require_repository(repo: str) -> None:
    """Raise a UserError unless ``repo`` is a name of the form owner/name."""
    if not REPOSITORY.fullmatch(repo):
        raise UserError(f"--repo {shown(repo)} is not of the form owner/name")


def publish(folder: Path, repo: str, public: bool) -> str:
    """Upload an export as one commit; the repository is made if it does not exist.

    Args:
        folder: an export.
        repo: owner/name of a model on the hub.
        public: whether everybody may see it. A repository that exists stays as it is.

    Returns:
        The address of the model, and who can see it.

    Raises:
        UserError: the export cannot be used, the hub refuses, or the repository is public and ``public`` is
            not given.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, constants
    from huggingface_hub.utils import logging as hub_logging
    from huggingface_hub.utils.tqdm import disable_progress_bars

    require_repository(repo)
    files = export_files(folder)
    hub_logging.set_verbosity_error()
    if not sys.stderr.isatty():
        disable_progress_bars()
    with _hub_errors(repo, constants.ENDPOINT):
        check_reachable(constants.ENDPOINT)
        api = HfApi()
        address = api.create_repo(repo, private=not public, exist_ok=True).url
        private = bool(api.model_info(repo).private)
        if not private and not public:
            raise UserError(f"{repo} exists and is public: give --public to publish there")
        api.create_commit(
            repo,
            [CommitOperationAdd(name, folder / name) for name in files],
            commit_message=f"Export of {read_export(folder).run} by storylab",
        )
    return f"{address} ({'private' if private else 'public'})"


@contextmanager
def _hub_errors(repo: str, endpoint: str) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # the hub's client lets its transport's errors through
        reason = " ".join(without_secrets(str(error)).split())[:200] or type(error).__name__
        status = getattr(getattr(error, "response", None), "status_code", None)
        remedy = "try again"
        if status in UNAUTHORIZED:
            remedy = "log in with `hf auth login`, or set HF_TOKEN to a token that may write there"
        raise UserError(f"cannot publish {repo} at {endpoint} ({reason}); {remedy}") from error
