"""Errors as the API words them."""

from __future__ import annotations

import math
from typing import Any


class ApiError(Exception):
    """An answer with a numeric code; raised anywhere below a route."""

    def __init__(
        self, status: int, code: int, message: str, *, extra: dict[str, Any] | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.body: dict[str, Any] = {"message": message, "code": code, **(extra or {})}


def form_error(name: str, code: str, message: str) -> ApiError:
    """50035, whose `errors` tree names the field."""
    errors = {name: {"_errors": [{"code": code, "message": message}]}}
    return ApiError(400, 50035, "Invalid Form Body", extra={"errors": errors})


def unknown(what: str, code: int) -> ApiError:
    return ApiError(404, code, f"Unknown {what}")


class TooMany(ApiError):
    """A 429 of the API's, with the headers that name it."""

    def __init__(self, retry_after: float, scope: str = "user", code: int | None = None) -> None:
        extra: dict[str, Any] = {"retry_after": round(retry_after, 3), "global": scope == "global"}
        super().__init__(429, code or 0, "You are being rate limited.", extra=extra)
        if code is None:
            del self.body["code"]
        self.headers = {
            "Retry-After": str(max(1, math.ceil(retry_after))),
            "X-RateLimit-Scope": scope,
        }
        if scope == "global":
            self.headers["X-RateLimit-Global"] = "true"
