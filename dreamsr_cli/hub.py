"""Downloads from a hub that speaks Hugging Face's HTTP API: one file at a time, resumable, errors a person can act on.

huggingface_hub 2 names its temporary file anew in every process, so a killed download begins at zero; here the bytes
lie in `NAME.part` beside the target and its `http_get` continues them by a range request. Proxies, certificates and
time-outs follow the hub's own environment variables.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from dreamsr_cli.errors import WeightsError
from dreamsr_cli.weights_lock import LockEntry, LockRow

PUBLIC = "https://huggingface.co"
TOKEN_HINT = "hf auth login, or pass --token"


@dataclass(frozen=True)
class RemoteFile:
    """What the hub says about one file of a repository."""

    path: str
    """Path inside the repository."""
    size: int
    """Bytes."""
    sha256: str | None
    """Content hash where the hub keeps one (large files); small ones have none."""


@dataclass(frozen=True)
class Hub:
    """One hub: where it is and who asks."""

    endpoint: str | None = None
    """URL of the hub or of a mirror; None: HF_ENDPOINT, else the public hub."""
    token: str | None = None
    """Access token; None: HF_TOKEN or the one that `hf auth login` stored."""

    @property
    def address(self) -> str:
        """URL without a trailing slash."""
        return (self.endpoint or os.environ.get("HF_ENDPOINT") or PUBLIC).rstrip("/")

    def page(self, entry: LockEntry) -> str:
        """The repository's page, for people."""
        return f"{self.address}/{entry.repository}"

    def download(self, entry: LockEntry, row: LockRow, target: Path) -> None:
        """Fetch one file to `target`, going on from `target.part` if that is there.

        The caller checks the content's hash. Raises `WeightsError` for everything that can go wrong on the way: no
        network, no such repository, revision or file, a gate, another size than the lock's, a full disk.
        """
        from huggingface_hub.file_download import get_hf_file_metadata, hf_hub_url, http_get
        from huggingface_hub.utils import build_hf_headers, disable_progress_bars, logging

        disable_progress_bars()
        logging.set_verbosity_error()  # its retries are its own; what is left after them is told here
        logging.disable_propagation()
        part = part_of(target)
        with self._explained(entry, row.path):
            target.parent.mkdir(parents=True, exist_ok=True)
            headers, size, location = build_hf_headers(token=False), row.size, row.url
            if location is None:
                url = hf_hub_url(str(entry.repository), row.path, revision=entry.revision, endpoint=self.address)
                found = get_hf_file_metadata(url, token=self.token, endpoint=self.address)
                if row.sure and row.size is not None and found.size not in (None, row.size):
                    raise WeightsError(
                        f"{entry.repository}: {row.path} has {found.size:,} bytes there, "
                        f"weights.lock says {row.size:,}",
                        "another mirror, or report a wrong pin",
                    )
                size, location = found.size, found.location
                if urlsplit(location).netloc == urlsplit(self.address).netloc:
                    # A storage server gets a signed address; the token is the hub's alone.
                    headers = build_hf_headers(token=self.token)
            have = part.stat().st_size if part.is_file() else 0
            if size is not None and have > size:
                part.unlink()
                have = 0
            if size is None or have < size:
                with part.open("ab") as stream:
                    http_get(location, stream, resume_size=have, headers=headers, expected_size=size)
            elif not part.exists():
                part.touch()
            os.replace(part, target)

    def list_files(self, entry: LockEntry, revision: str | None = None) -> tuple[str, list[RemoteFile]]:
        """(commit, files) of the entry's repository at `revision` (None: its newest). Raises `WeightsError`."""
        from huggingface_hub import HfApi

        with self._explained(entry, ""):
            api = HfApi(endpoint=self.address, token=self.token)
            info = api.model_info(str(entry.repository), revision=revision, files_metadata=True)
            files = [
                RemoteFile(file.rfilename, file.size or 0, file.lfs.sha256 if file.lfs else None)
                for file in info.siblings or []
            ]
        return str(info.sha), sorted(files, key=lambda file: file.path)

    @contextmanager
    def _explained(self, entry: LockEntry, path: str) -> Generator[None]:
        """Turn the hub's and the disk's exceptions into a `WeightsError`."""
        from huggingface_hub import errors

        name = f"{entry.repository}: {path}" if path else str(entry.repository)
        again = f"dreamsr fetch-weights {entry.name}"
        try:
            yield
        except errors.GatedRepoError as error:
            if _status(error) == 401:
                message = f"{entry.repository} is gated and this request carried no valid token"
                raise WeightsError(
                    message, f"visit {self.page(entry)} and accept the licence, then {TOKEN_HINT}"
                ) from error
            message = f"{entry.repository} is gated and your account has not accepted its licence"
            raise WeightsError(message, f"visit {self.page(entry)}, accept, then: {again}") from error
        except errors.RevisionNotFoundError as error:
            message = f"{entry.repository} has no revision {entry.revision} at {self.address}"
            raise WeightsError(message, "another --mirror, or report that the pin is gone") from error
        except (errors.RemoteEntryNotFoundError, errors.LocalEntryNotFoundError, errors.EntryNotFoundError) as error:
            if isinstance(error, errors.LocalEntryNotFoundError):
                raise self._unreachable(error) from error
            raise WeightsError(f"{name} is not there at revision {entry.revision}", "another --mirror") from error
        except errors.RepositoryNotFoundError as error:
            message = f"{self.address} knows no repository {entry.repository}, or it is private"
            raise WeightsError(message, f"check --mirror, or {TOKEN_HINT}") from error
        except errors.OfflineModeIsEnabled as error:
            raise WeightsError(f"{name}: HF_HUB_OFFLINE is set", "unset HF_HUB_OFFLINE, or --from-folder") from error
        except errors.HfHubHTTPError as error:
            status = _status(error)
            if status == 401 or status == 403:
                raise WeightsError(f"{name}: access denied ({status})", f"{TOKEN_HINT}, then: {again}") from error
            raise WeightsError(f"{name}: the hub answered {status}", f"wait a little, then: {again}") from error
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                message = f"{name}: the disk is full"
                raise WeightsError(message, f"make room or --dest another disk, then: {again}") from error
            if error.errno in (errno.EACCES, errno.EROFS, errno.ENOTDIR):
                raise WeightsError(f"{error.filename}: {error.strerror}", "another folder: --dest FOLDER") from error
            raise self._unreachable(error, name) from error
        except Exception as error:
            # The transport's own exceptions (httpx2) share no base class with the hub's.
            if type(error).__module__.split(".")[0] in ("httpx", "httpx2", "httpcore", "httpcore2"):
                raise self._unreachable(error, name) from error
            raise

    def _unreachable(self, error: Exception, name: str = "") -> WeightsError:
        what = f"{name}: " if name else ""
        return WeightsError(
            f"{what}{self.address} can't be reached, or the connection broke: {str(error) or type(error).__name__}",
            "check the network, then type the same command: it goes on where it stopped",
        )


def part_of(target: Path) -> Path:
    """Where the bytes of an unfinished download of `target` lie."""
    return target.with_name(target.name + ".part")


def _status(error: Any) -> int | None:
    response = getattr(error, "response", None)
    return getattr(response, "status_code", None)
