"""A client of the sandbox whose answers are held against the official description."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import pytest

OPENAPI = Path(__file__).parents[1] / "data" / "openapi.json"
AGENT = "DiscordBot (https://example.invalid, 1)"


@cache
def validator(name: str) -> jsonschema.Draft202012Validator:
    document = json.loads(OPENAPI.read_text(encoding="utf-8"))
    schema = {"$ref": f"#/components/schemas/{name}", "components": document["components"]}
    return jsonschema.Draft202012Validator(schema)


def valid(body: Any, name: str) -> Any:
    validator(name).validate(body)
    return body


class Api:
    valid = staticmethod(valid)

    def __init__(self, sandbox) -> None:
        self.sandbox = sandbox
        self.channel = f"/channels/{sandbox.channel_ids[0]}"
        self.messages = f"{self.channel}/messages"
        self.http = httpx.Client(base_url=sandbox.api_url, headers={"User-Agent": AGENT})
        self.use(sandbox.token)

    def use(self, token: str) -> None:
        self.http.headers["Authorization"] = f"Bot {token}"

    def __call__(self, method: str, path: str, **more: Any) -> httpx.Response:
        answer = self.http.request(method, path, **more)
        assert answer.headers["via"] == "1.1 google"
        if answer.status_code != 204:
            assert answer.headers["content-type"] == "application/json"
        if 400 <= answer.status_code < 429 and answer.json().get("code"):
            # not ErrorResponse: it wants integers for field codes, where the docs show names
            valid(answer.json(), "Error")
        return answer

    def post(self, *contents: bytes, name: str = "pack.bin", path: str = "", **payload: Any):
        files = [
            (f"files[{n}]", (name, data, "application/octet-stream"))
            for n, data in enumerate(contents)
        ]
        data = {"payload_json": json.dumps(payload)}
        return self("POST", path or self.messages, files=files or None, data=data)

    def refused(self, answer: httpx.Response, status: int, code: int) -> None:
        assert (answer.status_code, answer.json()["code"]) == (status, code)


@pytest.fixture
def api(sandbox):
    sandbox.settings(rate_limits=False)
    it = Api(sandbox)
    yield it
    it.http.close()
