"""Access control: hosts, origins, the API key, and bodies."""

import httpx
import openai
import pytest

from pocketlm.serving.limits import ServerLimits
from pocketlm.serving.middleware import allowed_hosts
from tests.support.server import KEY, RunningServer, error_of, serving_in_thread

COMPLETION = {"model": "small", "prompt": "hello"}
CHUNK = b" " * 2**16  # 16 of them are as much as a body may have


@pytest.mark.parametrize("body", [b" " * (2**20 + 1), [CHUNK] * 17], ids=["whole", "chunked"])
def test_a_body_that_is_too_large_is_refused(
    server: RunningServer, body: bytes | list[bytes]
) -> None:
    """A chunked body has no length in its headers."""
    content = body if isinstance(body, bytes) else iter(body)
    error_of(server.post("/v1/completions", content=content), 413)


def test_a_body_must_be_declared_as_json(server: RunningServer) -> None:
    headers = {"content-type": "text/plain"}
    error_of(server.post("/v1/completions", content=b"{}", headers=headers), 415)


def test_other_hosts_are_refused(server: RunningServer) -> None:
    port = server.port
    for host in (
        "evil.example",
        f"evil.example:{port}",
        "127.0.0.1",
        f"127.0.0.1:{port + 1}",
        f"localhost.evil:{port}",
    ):
        error_of(server.get("/health", headers={"host": host}), 403)
    for host in (f"localhost:{port}", f"127.0.0.1:{port}", f"[::1]:{port}"):
        assert server.get("/health", headers={"host": host}).status_code == 200


def test_other_origins_are_refused(server: RunningServer) -> None:
    for origin in ("http://evil.example", "null", f"http://127.0.0.1:{server.port + 1}"):
        headers = {"origin": origin}
        error_of(server.post("/v1/completions", json=COMPLETION, headers=headers), 403)
    response = server.post("/v1/completions", json=COMPLETION, headers={"origin": server.url})
    assert response.status_code == 200
    assert not [name for name in response.headers if name.startswith("access-control")]


def test_hosts_are_checked_on_loopback_addresses_only() -> None:
    assert allowed_hosts("0.0.0.0", 8000) is None
    assert allowed_hosts("::1", 8000) == {"localhost:8000", "127.0.0.1:8000", "[::1]:8000"}
    assert {"localhost", "localhost:80"} < allowed_hosts("localhost", 80)
    others = ["localhost:9000", "Tunnel.example"]
    more = allowed_hosts("127.0.0.1", 8000, others)
    assert more - allowed_hosts("127.0.0.1", 8000) == {"localhost:9000", "tunnel.example"}


def test_a_host_that_is_allowed_and_its_pages_are_let_in(server: RunningServer) -> None:
    """As through a tunnel from another port."""
    with serving_in_thread(server.checkpoint, ServerLimits(), host="localhost:9000") as tunnel:
        headers = {"host": "localhost:9000", "origin": "http://localhost:9000"}
        response = tunnel.post("/v1/completions", json=COMPLETION, headers=headers)
        assert response.status_code == 200
        error = error_of(tunnel.get("/health"), 403)
        assert "start serve.py with --allow-host" in error["message"]
        wrong = headers | {"origin": "http://localhost:9001"}
        error_of(tunnel.post("/v1/completions", json=COMPLETION, headers=wrong), 403)


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": "Bearer wrong"},
        {"authorization": KEY},
        {"authorization": "Bearer \xff".encode("latin-1")},
    ],
    ids=["missing", "wrong", "without Bearer", "not ASCII"],
)
def test_paths_under_v1_need_the_key(
    protected_server: RunningServer, headers: dict[str, str | bytes]
) -> None:
    error = error_of(protected_server.get("/v1/models", headers=headers), 401)
    assert error["code"] == "invalid_api_key"


def test_other_paths_need_no_key(protected_server: RunningServer) -> None:
    assert httpx.get(f"{protected_server.url}/health").status_code == 200


def test_openais_client_sends_the_key(protected_server: RunningServer) -> None:
    base_url = f"{protected_server.url}/v1"
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=base_url, api_key="other", max_retries=0).models.list()
    assert protected_server.client.models.list().data[0].id == "protected"
