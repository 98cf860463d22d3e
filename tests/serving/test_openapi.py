"""The API as its OpenAPI description says, with the requests that schemathesis makes of it."""

import json
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings

from tests.support.server import RunningServer, error_of

N_EXAMPLES = 50  # for each path and kind: what the description allows, and what it does not
KINDS = {
    "allowed": schemathesis.GenerationMode.POSITIVE,
    "forbidden": schemathesis.GenerationMode.NEGATIVE,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_any_request_gets_a_response_or_a_refusal(
    server: RunningServer, path: str, kind: str
) -> None:
    """A refusal is an error in OpenAI's format; no request is a failure of the server."""
    schema = schemathesis.openapi.from_dict(server.get("/openapi.json").json())
    requests = schema[path]["POST"].as_strategy(generation_mode=KINDS[kind])
    statuses = []

    @settings(max_examples=N_EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
    @given(requests)
    def send(request: Any) -> None:
        body = request.body
        if isinstance(body, dict):
            body |= {"max_tokens": 2}
            if kind == "allowed":  # or the answer is that there is no such model
                body["model"] = server.name
        content = body if isinstance(body, bytes) else json.dumps(body, default=str)
        response = server.post(path, content=content)
        statuses.append(response.status_code)
        if response.status_code != 200:
            assert response.status_code < 500, response.text
            error_of(response, response.status_code)

    send()
    assert len(statuses) >= N_EXAMPLES
    assert (200 in statuses) or kind == "forbidden"


def test_the_description_names_every_path(server: RunningServer) -> None:
    paths = server.get("/openapi.json").json()["paths"]
    assert {path: set(methods) for path, methods in paths.items()} == {
        "/": {"get"},
        "/health": {"get"},
        "/metrics": {"get"},
        "/v1/models": {"get"},
        "/v1/models/{name}": {"get"},
        "/v1/completions": {"post"},
        "/v1/chat/completions": {"post"},
    }
