"""Downloads: resumed where they stopped, retried, and verified before they take their final name."""

from __future__ import annotations

import http.client
import os
import time
import urllib.error
import urllib.request
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from metarun.errors import DataError
from metarun.storage.files import CHUNK, file_sum, kind_of_sum
from metarun.storage.locks import once

TIMEOUT = 30.0  # seconds without a byte before a connection counts as lost
TRIES = 3
PAUSE = 1.0  # seconds before the second try; one more before each later one


def download(url: str, path: Path, checksum: str | None) -> None:
    """Download `url` to `path`, unless that file exists.

    What arrives is kept in `path`.part, which a later attempt resumes, in this call or the next one.
    `path` itself appears only when the file is complete and its sum is right.

    Args:
        url: what to download.
        path: the file to write; its folder is created if missing.
        checksum: the MD5 or SHA-256 sum in hexadecimal; None: none is known, and only the length is checked.

    Raises:
        DataError: the download failed or its sum is wrong; the message says how to do it by hand.
    """
    once(path, lambda: path.exists() or None, lambda: _download(url, path, checksum), "METARUN_DATA")


def _download(url: str, path: Path, checksum: str | None) -> None:
    part = path.with_name(path.name + ".part")
    try:
        fetch(url, part)
    except OSError as error:
        raise DataError(
            f"cannot download {url}: {_reason(error)}; check the network, or put that file at {path} yourself"
        ) from error
    if checksum is not None and (found := file_sum(part, like=checksum)) != checksum:
        part.unlink()
        raise DataError(
            f"{url} gave a file with {kind_of_sum(checksum)} sum {found} where {checksum} is right; it was "
            f"deleted: try again later, or put the right file at {path} yourself"
        )
    os.replace(part, path)


def fetch(url: str, part: Path) -> None:
    """Download `url` to the file `part`, resuming from what is there; retries errors that may pass.

    Raises:
        OSError: the last attempt failed, or the server's answer makes another one pointless.
    """
    for tried in range(1, TRIES + 1):
        try:
            return _receive(url, part)
        except (OSError, http.client.HTTPException) as error:  # OSError covers urllib's own
            status = 500
            if isinstance(error, urllib.error.HTTPError):
                status = error.code
                error.close()  # it is the response as well
            if tried == TRIES or (status < 500 and status not in (408, 416, 429)):
                raise error if isinstance(error, OSError) else ConnectionError(_reason(error)) from error
            if status == 416:  # what is there is not the beginning of this file: start over
                part.unlink(missing_ok=True)
            time.sleep(PAUSE * tried)


def _reason(error: Exception) -> str:
    if isinstance(error, urllib.error.URLError) and not isinstance(error, urllib.error.HTTPError):
        return str(error.reason)  # without urllib's brackets around it
    return str(error) or type(error).__name__


def _receive(url: str, part: Path) -> None:
    """Download `url` to `part` in one attempt; resumes from what is there if the server supports ranges."""
    have = part.stat().st_size if part.exists() else 0
    headers = {"User-Agent": "metarun"} | ({"Range": f"bytes={have}-"} if have else {})
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT) as response:
        if response.status != 206:  # the server sends the whole file, whatever was requested
            have = 0
        total = None if response.length is None else have + response.length
        with open(part, "ab" if have else "wb") as file, _bytes_bar() as bar:
            name = url.rpartition("/")[2].partition("?")[0]
            task = bar.add_task(f"download {name}", completed=have, total=total)
            while chunk := response.read(CHUNK):
                file.write(chunk)
                have += len(chunk)
                bar.update(task, completed=have)
            file.flush()
            os.fsync(file.fileno())
    if total is not None and have < total:  # urllib reports a closed connection as the end of the file
        raise ConnectionError(f"the connection was lost after {have:,} of {total:,} bytes")


def _bytes_bar() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    return Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True))
