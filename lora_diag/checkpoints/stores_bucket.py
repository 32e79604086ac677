"""Files in buckets, through the file systems of fsspec: ``s3://`` by s3fs, ``gs://`` by gcsfs.

A folder is listed once; ranges are checked against the sizes and versions of the listing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from lora_diag.checkpoints.addresses import TransientError, call_with_retries
from lora_diag.checkpoints.stores import CHANGED, TRANSIENT, FileInfo, Store, filesystem, first_line_of
from lora_diag.errors import InputError

# Names of botocore's errors for broken connections and answers; botocore is importable only with s3fs.
BROKEN = frozenset({"ConnectionError", "HTTPClientError", "ResponseStreamingError", "IncompleteReadError"})


class BucketStore(Store):
    """Files in buckets, through the file systems of fsspec.

    Args:
        scheme: ``s3`` or ``gs``.
    """

    def __init__(self, scheme: str) -> None:
        super().__init__()
        self._scheme = scheme
        self._listed: dict[str, dict[str, Any]] = {}

    def is_folder(self, address: str) -> bool:
        """Return whether there is any file under an address."""
        return bool(self._list_entries(address))

    def children(self, address: str) -> Iterable[str]:
        """Return the addresses of a folder's content."""
        return list(self._list_entries(address))

    def read_range(self, address: str, start: int, buffer: memoryview, file_info: FileInfo) -> None:
        """Fill a buffer by one request, and check the version of the file.

        S3 checks it on the server; other stores are queried afterwards.
        """
        stop = start + len(buffer)
        if self._scheme == "s3":
            content = self._call(address, self._read_s3, address, start, stop, file_info)
        else:
            content = self._call(address, self._fs.cat_file, _make_key(address), start=start, end=stop)
            current = self._call(address, self._fs.info, _make_key(address))
            if content is None or current is None or _make_file_info(current) != file_info:
                raise InputError(f"{address}: {CHANGED}")
        if len(content) > len(buffer):
            raise InputError(f"{address}: the store sent more bytes than requested; download the file")
        buffer[: len(content)] = content
        if len(content) < len(buffer):
            raise TransientError("the answer was cut short", len(content))

    def _find(self, address: str) -> FileInfo | None:
        listed = self._listed.get(address.rpartition("/")[0])
        if listed is not None:
            entry = listed.get(address)
        else:  # not listed: the folder of a single requested file may be very large
            self._open()
            entry = call_with_retries(address, lambda: self._call(address, self._fs.info, _make_key(address)))
        return _make_file_info(entry) if entry is not None and entry.get("type") == "file" else None

    def _list_entries(self, folder: str) -> dict[str, Any]:
        """Return the entries of a folder by address, requested once."""
        if folder not in self._listed:
            self._open()
            listing = call_with_retries(
                folder, lambda: self._call(folder, self._fs.ls, _make_key(folder), detail=True, refresh=True)
            )
            by_address = {f"{self._scheme}://{entry['name'].strip('/')}": entry for entry in listing or ()}
            self._listed[folder] = {
                address: entry for address, entry in by_address.items() if address.startswith(f"{folder}/")
            }
        return self._listed[folder]

    def _open(self) -> None:
        if self._fs is None:
            # Retries are done and counted in ``addresses``.
            options = {"config_kwargs": {"retries": {"max_attempts": 0}}} if self._scheme == "s3" else {}
            self._fs = filesystem(self._scheme, use_listings_cache=False, **options)
            if self._scheme == "s3":
                self._fs.retries = 1

    def _call(self, address: str, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """Call a method of the file system and translate its errors; return None if the file does not exist."""
        self._open()
        try:
            return function(*args, **options)
        except FileNotFoundError:
            return None
        except (InputError, TransientError):
            raise
        except PermissionError as error:
            raise InputError(
                f"{address}: access is denied: {first_line_of(error)}{self._describe_requirements()}"
            ) from error
        except Exception as error:  # from fsspec, aiohttp and two cloud libraries
            if "credentials" in type(error).__name__.lower() or "token" in type(error).__name__.lower():
                public = "; for a public bucket set FSSPEC_S3_ANON=true" if self._scheme == "s3" else ""
                raise InputError(f"{address}: no credentials: {first_line_of(error)}{public}") from error
            if isinstance(error, OSError) or any(kind.__name__ in BROKEN for kind in type(error).__mro__):
                raise TransientError(first_line_of(error)) from error
            raise InputError(f"{address}: cannot be read: {first_line_of(error)}") from error

    def _describe_requirements(self) -> str:
        return "; reading needs s3:GetObject and s3:ListBucket" if self._scheme == "s3" else ""

    def _read_s3(self, address: str, start: int, stop: int, file_info: FileInfo) -> bytes:
        from fsspec.asyn import sync

        return bytes(sync(self._fs.loop, self._get_s3, address, start, stop, file_info))

    async def _get_s3(self, address: str, start: int, stop: int, file_info: FileInfo) -> bytes:
        from botocore.exceptions import ClientError  # type: ignore[import-untyped]

        await self._fs.set_session()
        bucket, key, _ = self._fs.split_path(_make_key(address))
        client = await self._fs.get_s3(bucket)
        condition = {"IfMatch": file_info.version} if file_info.version else {}
        try:
            response = await client.get_object(
                Bucket=bucket, Key=key, Range=f"bytes={start}-{stop - 1}", **condition, **self._fs.req_kw
            )
        except ClientError as error:
            status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode")
            if status in {404, 412, 416}:
                raise InputError(f"{address}: {CHANGED} (the store answers {status})") from error
            if status in {401, 403}:
                raise InputError(
                    f"{address}: access is denied: {first_line_of(error)}{self._describe_requirements()}"
                ) from error
            if status in TRANSIENT:
                raise TransientError(f"the store answers {status}") from error
            raise InputError(f"{address}: cannot be read: {first_line_of(error)}") from error
        async with response["Body"] as body:
            if (
                response.get("ContentLength") != stop - start
                or response.get("ContentRange") != f"bytes {start}-{stop - 1}/{file_info.size}"
            ):
                raise InputError(
                    f"{address}: the store sent {response.get('ContentRange', 'no range')!r} instead of bytes "
                    f"{start:,} to {stop:,} of {file_info.size:,}; download the file and give the local path"
                )
            if file_info.version and response.get("ETag", file_info.version) != file_info.version:
                raise InputError(f"{address}: {CHANGED}")
            return bytes(await body.read())


def _make_key(address: str) -> str:
    """Return the bucket and path of an address, as fsspec expects them."""
    return address.partition("://")[2]


def _make_file_info(entry: Any) -> FileInfo:
    version_keys = ("ETag", "generation", "etag", "md5Hash", "LastModified", "updated")
    return FileInfo(int(entry["size"]), next((str(entry[key]) for key in version_keys if entry.get(key)), ""))
