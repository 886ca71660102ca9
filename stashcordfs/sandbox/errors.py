"""Errors as the API words them."""

from __future__ import annotations

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
