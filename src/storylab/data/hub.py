"""Download a file of a repository on the Hugging Face hub, or find it in the hub's cache."""

from __future__ import annotations

import socket
import urllib.parse
import urllib.request
from contextlib import suppress
from pathlib import Path

from storylab.errors import UserError

THREE_WAYS = (
    "three ways on: local files (storylab prepare --train FILES --validation FILES "
    "--out data/tinystories-gpt2), a mirror of the hub (HF_ENDPOINT=URL before the command), or "
    "the built-in corpus (storylab prepare --source builtin, then --data_dir data/builtin-gpt2)"
)


def download(repo: str, file: str, revision: str, repo_type: str) -> Path:
    """Fetch one file of a hub repository into the hub's cache, and return its path there.

    An interrupted download continues where it stopped.

    Raises:
        UserError: there is no network or no such file; the message lists the alternatives.
    """
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub.errors import LocalEntryNotFoundError
    from huggingface_hub.utils import logging as hub_logging

    # The client announces every retry at length; the error below says how they ended.
    hub_logging.set_verbosity_error()

    def fetch(cached: bool) -> Path:
        return Path(
            hf_hub_download(
                repo, file, revision=revision, repo_type=repo_type, local_files_only=cached
            )
        )

    endpoint = constants.ENDPOINT
    try:
        with suppress(LocalEntryNotFoundError):
            return fetch(cached=True)
        check_reachable(endpoint)
        return fetch(cached=False)
    except Exception as error:  # the hub's client lets its transport's errors through
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(
            f"cannot get {file} of {repo} from {endpoint} ({reason}); {THREE_WAYS}"
        ) from error


def check_reachable(endpoint: str) -> None:
    """Fail at once without a network; the hub's client would retry for half a minute.

    Raises:
        OSError: the hub cannot be reached.
    """
    if urllib.request.getproxies():
        return  # a proxy may reach the hub although this machine cannot
    address = urllib.parse.urlsplit(endpoint)
    port = address.port or (80 if address.scheme == "http" else 443)
    socket.create_connection((address.hostname or "", port), timeout=10).close()
