"""S3 as this package uses it: retried by botocore's own rules, and one StorageError line for what retries do not cure.

Endpoint, credentials and region come from the usual environment variables (AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, ...).
Apart from `storage`, which imports it only for s3:// paths: botocore takes half a second to import.
"""

from typing import Any

from botocore.exceptions import BotoCoreError, ParamValidationError
from fsspec.asyn import sync_wrapper
from s3fs import S3FileSystem

from longer.errors import StorageError, one_line

CONFIG = {
    "retries": {
        "mode": "standard",
        "total_max_attempts": 6,
    },  # server errors, throttling, broken connections; with back-off
    "connect_timeout": 10,
    "read_timeout": 30,  # of silence, not of a whole answer
    # Servers other than AWS answer a ranged read with the checksum of the whole object, or know no checksum trailers.
    # The tables' manifests hold checksums of their own.
    "response_checksum_validation": "when_required",
    "request_checksum_calculation": "when_required",
}


class S3(S3FileSystem):
    """s3fs whose failures are a StorageError that names the object; an object that is not there stays FileNotFoundError."""

    async def _call_s3(self, method: str, *args: Any, **kwargs: Any) -> Any:
        try:
            return await super()._call_s3(method, *args, **kwargs)
        except ParamValidationError:
            raise
        except (BotoCoreError, OSError) as error:
            if isinstance(error, FileNotFoundError | FileExistsError) and not _no_bucket(error):
                raise
            place = "/".join(str(kwargs[name]) for name in ("Bucket", "Key") if name in kwargs)
            raise StorageError(
                f"s3://{place}: {one_line(error)}: check AWS_ENDPOINT_URL, the bucket, the credentials and the region"
            ) from None

    call_s3 = sync_wrapper(_call_s3)


def connect() -> S3:
    """The filesystem of s3:// paths, one a process; listings are never stale."""
    return S3(use_listings_cache=False, config_kwargs=CONFIG)


def _no_bucket(error: OSError) -> bool:
    response = getattr(error.__cause__, "response", {})
    return response.get("Error", {}).get("Code") == "NoSuchBucket"
