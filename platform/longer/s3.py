"""S3 as this package uses it: retried by botocore's own rules, and one StorageError line for what retries do not cure.

Endpoint, credentials and region come from the usual environment variables (AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, ...).
Apart from `storage`, which imports it only for s3:// paths: botocore takes half a second to import.
"""

from typing import Any

from botocore.exceptions import BotoCoreError, ClientError, ParamValidationError
from fsspec.asyn import sync_wrapper
from s3fs import S3FileSystem
from s3fs.core import S3_RETRYABLE_ERRORS, add_retryable_error
from s3fs.errors import translate_boto_error

from longer.errors import StorageError, one_line

CONFIG: dict[str, Any] = {
    "retries": {
        "mode": "standard",
        "total_max_attempts": 6,
    },  # server errors, throttling, broken connections; with back-off
    "connect_timeout": 10,
    "read_timeout": 15,  # of silence, not of a whole answer; six times that until a silent store is reported
    # Servers other than AWS answer a ranged read with the checksum of the whole object, or know no checksum trailers.
    # The tables' manifests hold checksums of their own.
    "response_checksum_validation": "when_required",
    "request_checksum_calculation": "when_required",
}


class CutError(StorageError):
    """An answer that broke off. botocore is done once it begins, so s3fs asks again, five times in all."""


add_retryable_error(CutError)


class S3(S3FileSystem):
    """s3fs whose failures are a StorageError that names the object; an object that is not there stays FileNotFoundError."""

    async def set_session(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return await super().set_session(*args, **kwargs)
        except ValueError as error:
            raise StorageError(
                f"AWS_ENDPOINT_URL: {one_line(error)}: write it as http://host:port or https://host"
            ) from None

    async def _call_s3(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """As that of s3fs, without its five tries, which would each be botocore's six."""
        place = "s3://" + "/".join(str(kwargs[name]) for name in ("Bucket", "Key") if name in kwargs)
        await self.set_session()
        call = getattr(await self.get_s3(kwargs.get("Bucket")), method)
        try:
            answer = await call(**self._get_s3_method_kwargs(call, *args, **kwargs))
        except ParamValidationError as error:
            raise StorageError(f"{place}: {' '.join(str(error).split())}") from None
        except (BotoCoreError, ClientError, OSError) as error:
            failure = translate_boto_error(error)
            if isinstance(failure, FileNotFoundError | FileExistsError) and not _no_bucket(failure):
                raise failure from error
            raise StorageError(
                f"{place}: {one_line(failure)}: check AWS_ENDPOINT_URL, the bucket, the credentials and the region"
            ) from None
        return {**answer, "Body": _Body(answer["Body"], place)} if "Body" in answer else answer

    call_s3 = sync_wrapper(_call_s3)


class _Body:
    """An answer's body; where it breaks off, CutError names the object."""

    def __init__(self, body: Any, place: str) -> None:
        self._body, self._place = body, place

    async def read(self, *size: int) -> bytes:
        try:
            return await self._body.read(*size)
        except S3_RETRYABLE_ERRORS as error:
            raise CutError(
                f"{self._place}: the answer broke off ({one_line(error)}): check the store and the network"
            ) from None

    def close(self) -> None:
        self._body.close()


def connect() -> S3:
    """The filesystem of s3:// paths, one a process; listings are never stale."""
    return S3(use_listings_cache=False, config_kwargs=CONFIG)


def be_quick(silence_s: float) -> None:
    """From now on in this process: a store that is silent for so long is asked once more, and then given up."""
    CONFIG.update(
        connect_timeout=silence_s, read_timeout=silence_s, retries={"mode": "standard", "total_max_attempts": 2}
    )


def _no_bucket(error: OSError) -> bool:
    response = getattr(error.__cause__, "response", {})
    return response.get("Error", {}).get("Code") == "NoSuchBucket"
