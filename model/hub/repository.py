"""A hub repository -> its snapshot folder on this disk, through the hub's own library.

That library brings its cache, its credentials (`HF_TOKEN`), its endpoint (`HF_ENDPOINT`) and
`HF_HUB_OFFLINE`; here only what is wanted of a repository is said, and what went wrong.
"""

from __future__ import annotations

import errno
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from huggingface_hub.utils.tqdm import (
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
)

from model.hub.cache import HubError

if TYPE_CHECKING:
    from rich.console import Console

_WANTED = ["*.safetensors", "*.json", "*.jinja"]
# Sub-folders hold other formats; `consolidated` is the same weights once more.
_UNWANTED = ["*/*", "consolidated*"]


def offline() -> bool:
    """Whether the user forbids the hub's network (HF_HUB_OFFLINE)."""
    return bool(constants.HF_HUB_OFFLINE)


def snapshot(
    name: str, console: Console | None, allow_download: bool, *, again: bool = False
) -> Path:
    """The repository's folder, complete; downloaded where that is needed and allowed.

    `again` fetches every file anew. Raises HubError."""
    quiet = console is None and not are_progress_bars_disabled()
    if quiet:
        disable_progress_bars()
    try:
        folder = snapshot_download(
            name,
            allow_patterns=_WANTED,
            ignore_patterns=_UNWANTED,
            local_files_only=not allow_download or offline(),
            force_download=again,
        )
    except GatedRepoError as error:
        raise HubError(
            f"the hub wants you to accept the terms of {name} first: do it on the model's page, "
            "then set HF_TOKEN"
        ) from error
    except RepositoryNotFoundError as error:
        raise HubError(
            f"the hub has no model {name}, or it is private; check the spelling, or set HF_TOKEN"
        ) from error
    except LocalEntryNotFoundError as error:
        raise HubError(_why_not_here(name, allow_download)) from error
    except Exception as error:  # whatever else the library and its HTTP client raise
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise HubError(
            f"{name} could not be downloaded ({first}); check the internet connection and try again"
        ) from error
    finally:
        if quiet:
            enable_progress_bars()
    if not any(Path(folder).glob("*.safetensors")):
        raise HubError(
            f"the hub's {name} has no safetensors; pickle checkpoints (.bin, .pt) are not read "
            "because loading one can run code, and a GGUF file is given by its path: take another "
            "repository, or convert it"
        )
    return Path(folder)


def _why_not_here(name: str, allow_download: bool) -> str:
    if offline():
        return (
            f"{name} is not in the hub's cache on this machine, or not wholly, and HF_HUB_OFFLINE "
            "forbids a download; unset it, or give a local folder or .gguf file"
        )
    if not allow_download:
        return f"{name} is not on this machine yet; fetch it with `headwater pull {name}`"
    return (
        f"{name} is not on this machine and the hub cannot be reached; check the internet "
        "connection and try again, or give a local folder or .gguf file"
    )
