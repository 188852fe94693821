"""Read byte ranges of files wherever they lie: local disks, http(s), object stores, the Hub, pipes."""

from __future__ import annotations

import os
import shlex
import subprocess
from typing import IO, Any, Protocol
from urllib.parse import urlsplit

from ..errors import DataConfigError

PIPE_PREFIX = "pipe:"
# what to install for a scheme that a filesystem package of its own reads
SCHEME_EXTRAS = {
    "s3": "s3",
    "s3a": "s3",
    "gs": "gcs",
    "gcs": "gcs",
    "abfs": "azure",
    "abfss": "azure",
    "az": "azure",
}
SCHEME_EXTRAS["hf"] = "hf"
MAX_RETRY_AFTER_S = 60.0
TRANSIENT_STATUSES = frozenset({408, 425, 429})
SKIPPED_BYTES = 1 << 20  # a pipe is read in pieces of this size up to the offset
MAX_REDIRECTS = 5


class ReadError(Exception):
    """Report one failed read: why, whether another try may help, and how long the server asks to wait.

    ``damaged`` tells content that is wrong from a storage that fails. The reason names no place: who reads knows it.
    """

    def __init__(self, reason: str, *, transient: bool, damaged: bool = False, after_s: float = 0.0) -> None:
        """Keep the reason and what is known of it."""
        super().__init__(reason)
        self.transient, self.damaged, self.after_s = transient, damaged, after_s


class Transport(Protocol):
    """Read files of some schemes; every failure is a ReadError."""

    def size(self, url: str) -> tuple[int, str]:
        """Return a file's size in bytes and a mark that changes when its content does ("" where none is known)."""
        ...

    def read(self, url: str, offset: int, length: int) -> bytes:
        """Return exactly ``length`` bytes from ``offset``."""
        ...


def is_local(place: str) -> bool:
    """Tell a path from a URL or a pipe."""
    return not place.startswith(PIPE_PREFIX) and "://" not in place


def shown(place: str) -> str:
    """Return a place as messages may show it: without user, password and query, which may hold secrets."""
    if is_local(place) or place.startswith(PIPE_PREFIX):
        return place
    try:
        parts = urlsplit(place)
    except ValueError:  # whoever reads it will say so
        return f"{place.partition('://')[0]}://..."
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def join(base: str, name: str) -> str:
    """Return the place of a file of a directory; ``name`` may be a place of its own."""
    if not is_local(name) or os.path.isabs(name):
        return name
    if is_local(base):
        return os.path.join(base, name)
    bare, mark, query = base.partition("?")
    return f"{bare.rstrip('/')}/{name}{mark}{query}"


class LocalFiles:
    """Read files of this host."""

    def size(self, url: str) -> tuple[int, str]:
        """Return the size and the time of the last change."""
        try:
            found = os.stat(url)
        except OSError as error:
            raise _from_os(error) from error
        return found.st_size, str(found.st_mtime_ns)

    def read(self, url: str, offset: int, length: int) -> bytes:
        """Read with one system call."""
        try:
            with open(url, "rb", buffering=0) as stream:
                content = os.pread(stream.fileno(), length, offset)
        except OSError as error:
            raise _from_os(error) from error
        return _whole(content, length, transient=False)


class HttpFiles:
    """Read over http(s), by Range requests on connections that stay open."""

    def __init__(self, timeout_s: float, threads: int) -> None:
        """Make the pool; nothing is connected before the first read."""
        import urllib3

        self._urllib3 = urllib3
        self._pool = urllib3.PoolManager(
            maxsize=threads,
            timeout=urllib3.Timeout(connect=timeout_s, read=timeout_s),
            retries=urllib3.Retry(0, redirect=MAX_REDIRECTS, raise_on_status=False),
            headers={"Accept-Encoding": "identity"},
        )

    def size(self, url: str) -> tuple[int, str]:
        """Ask for the headers alone."""
        response = self._request("HEAD", url, {})
        length = response.headers.get("Content-Length")
        if length is None:
            raise ReadError("the server does not tell the size", transient=False)
        return int(length), response.headers.get("ETag") or response.headers.get("Last-Modified") or ""

    def read(self, url: str, offset: int, length: int) -> bytes:
        """Ask for a range; a server that sends the whole file in its place is refused."""
        if not length:
            return b""
        response = self._request("GET", url, {"Range": f"bytes={offset}-{offset + length - 1}"})
        given = response.headers.get("Content-Range", "")
        if response.status != 206 or not given.startswith(f"bytes {offset}-"):
            response.close()
            raise ReadError(
                f"the server gives no byte ranges (status {response.status}); copy the shards to one that does",
                transient=False,
            )
        try:
            return _whole(response.read(), length, transient=True)
        except (self._urllib3.exceptions.HTTPError, OSError) as error:
            raise ReadError(_one_line(error), transient=True) from error

    def _request(self, method: str, url: str, headers: dict[str, str]) -> Any:
        merged = {**self._pool.headers, **headers}
        try:
            response = self._pool.request(method, url, headers=merged, preload_content=False)
        except self._urllib3.exceptions.LocationValueError as error:
            # its own text holds the whole URL, password and all
            raise ReadError("this URL cannot be parsed", transient=False) from error
        except (self._urllib3.exceptions.HTTPError, OSError) as error:
            raise ReadError(_one_line(error), transient=True) from error
        if response.status >= 400:
            response.close()
            after = response.headers.get("Retry-After", "")
            raise ReadError(
                f"status {response.status}",
                transient=response.status >= 500 or response.status in TRANSIENT_STATUSES,
                after_s=min(float(after), MAX_RETRY_AFTER_S) if after.isdigit() else 0.0,
            )
        return response


class FilesystemFiles:
    """Read what an fsspec filesystem reads: S3, Google and Azure storage, the Hugging Face Hub, and others."""

    def size(self, url: str) -> tuple[int, str]:
        """Ask the store."""
        filesystem, path = open_filesystem(url)
        try:
            info = filesystem.info(path)
        except Exception as error:
            raise store_error(error) from error
        mark = next(
            (str(info[key]) for key in ("ETag", "etag", "LastModified", "mtime", "blob_id") if info.get(key)),
            "",
        )
        return int(info["size"] or 0), mark

    def entries(self, url: str) -> dict[str, int | None]:
        """List a directory as it is now: sizes in bytes by name, None for a directory."""
        filesystem, path = open_filesystem(url)
        try:
            filesystem.invalidate_cache()  # a listing that is kept misses what others have written since
            listed = filesystem.ls(path, detail=True)
        except FileNotFoundError:
            return {}
        except Exception as error:
            raise store_error(error) from error
        return {
            str(entry["name"]).rstrip("/").rpartition("/")[2]: int(entry["size"] or 0)
            if entry["type"] == "file"
            else None
            for entry in listed
            if str(entry["name"]).strip("/") != path.strip("/")  # stores may list the directory in itself
        }

    def read(self, url: str, offset: int, length: int) -> bytes:
        """Read a range."""
        if not length:
            return b""
        filesystem, path = open_filesystem(url)
        try:
            content = filesystem.cat_file(path, start=offset, end=offset + length)
        except Exception as error:
            raise store_error(error) from error
        return _whole(content, length, transient=True)


class PipeFiles:
    """Read what a command writes; no shell is started, so a pipeline has to be asked for (``sh -c '...'``)."""

    def size(self, url: str) -> tuple[int, str]:
        """Run the command to its end and count."""
        process, stream = self._start(url)
        count = 0
        while piece := stream.read(SKIPPED_BYTES):
            count += len(piece)
        self._end(process, stream)
        return count, ""

    def read(self, url: str, offset: int, length: int) -> bytes:
        """Run the command and read past what comes before the range."""
        process, stream = self._start(url)
        left = offset
        while left and (piece := stream.read(min(left, SKIPPED_BYTES))):
            left -= len(piece)
        content = stream.read(length)
        if len(content) < length:
            self._end(process, stream)
        process.kill()
        process.wait()
        stream.close()
        return _whole(content, length, transient=True)

    def _start(self, url: str) -> tuple[subprocess.Popen[bytes], IO[bytes]]:
        try:
            words = shlex.split(url.removeprefix(PIPE_PREFIX)) or [""]
            process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
        except (OSError, ValueError, IndexError) as error:
            raise ReadError(f"the command cannot be started: {error}", transient=False) from error
        assert process.stdout is not None
        return process, process.stdout

    def _end(self, process: subprocess.Popen[bytes], stream: IO[bytes]) -> None:
        stream.close()
        if status := process.wait():
            raise ReadError(f"the command ended with status {status}", transient=True)


def open_filesystem(url: str) -> tuple[Any, str]:
    """Return the fsspec filesystem of a URL, and its path there.

    Raises DataConfigError for a scheme that is unknown or whose package is not installed.
    """
    import fsspec

    scheme = url.partition("://")[0]
    try:
        return fsspec.url_to_fs(url)  # type: ignore[no-any-return]
    except ImportError as error:
        extra = SCHEME_EXTRAS.get(scheme)
        need = f"pip install 'basestone[{extra}]'" if extra else f"pip install its package ({error})"
        raise DataConfigError(
            f"{shown(url)}: the scheme {scheme}:// needs a package that is not installed; {need}"
        ) from error
    except ValueError as error:
        raise DataConfigError(
            f"{shown(url)}: the scheme {scheme}:// is not known; use a path, http(s)://, s3://, gs://, abfs:// or hf://"
        ) from error
    except Exception as error:
        raise DataConfigError(
            f"{shown(url)}: {_one_line(error)}; check the place and your credentials"
        ) from error


def _whole(content: bytes, length: int, *, transient: bool) -> bytes:
    if len(content) != length:
        reason = f"got {len(content)} bytes, expected {length}; the shard was cut: copy it anew"
        raise ReadError(reason, transient=transient, damaged=True)
    return content


def _from_os(error: OSError) -> ReadError:
    permanent = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
    return ReadError(error.strerror or str(error), transient=not isinstance(error, permanent))


def store_error(error: Exception) -> ReadError:
    """Tell what a filesystem of fsspec raised: one line, and whether another try may help."""
    permanent = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, NotImplementedError)
    missing_credentials = type(error).__name__ in {"NoCredentialsError", "ParamValidationError"}
    return ReadError(_one_line(error), transient=not isinstance(error, permanent) and not missing_credentials)


def _one_line(error: Exception) -> str:
    reason = getattr(error, "reason", None)  # urllib3's own text holds the whole URL
    error = reason if isinstance(reason, Exception) else error
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
