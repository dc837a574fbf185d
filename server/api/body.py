"""Body: what the bodies of requests, and the objects in them, have in common.

They are refused for their first faults. pydantic tells of all, and a body of some megabytes can
have a million: everybody would wait for their telling. So lists have `fail_fast`, and what objects
have beside their own fields is counted before it is looked at.

Types are not bent: true is no 1, and "2" no 2. A whole number may stand for any number.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, model_validator
from pydantic_core import PydanticKnownError

MAX_FIELDS = 256


def at_most(limit: int) -> BeforeValidator:
    """A bound for an object that is read as a dict, before its values are looked at."""

    def check(value: Any) -> Any:
        if isinstance(value, dict) and len(value) > limit:
            raise PydanticKnownError(
                "too_long",
                {"field_type": "Object", "max_length": limit, "actual_length": len(value)},
            )
        return value

    return BeforeValidator(check)


class Body(BaseModel):
    """One that tells of its unknown fields, or keeps them."""

    model_config = ConfigDict(strict=True)

    @model_validator(mode="before")
    @classmethod
    def _few_fields(cls, value: Any) -> Any:
        if isinstance(value, dict) and len(value) > MAX_FIELDS:
            raise ValueError(f"an object has at most {MAX_FIELDS} fields here, not {len(value)}")
        return value


class Part(BaseModel):
    """One that ignores its unknown fields."""

    model_config = ConfigDict(extra="ignore", strict=True)
