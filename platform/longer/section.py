"""What every group of settings is, and paths in them."""

import os
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict


def same_for_workers(path: str) -> str:
    """The path as Ray's workers find it, who run in folders of their own; without a slash at its end, which S3 takes for a name."""
    return path.rstrip("/") if "://" in path else os.path.abspath(path)


WorkersPath = Annotated[str, AfterValidator(same_for_workers)]


class Section(BaseModel):
    """A frozen group of settings in which an unknown name is a mistake."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
