"""An S3 server on this machine as a fixture, which the conftest.py of a folder of tests imports."""

import logging
import socket
import threading

import fsspec
import pytest
from dynamic_dino import remote


@pytest.fixture(scope="module")
def server():
    """An S3 server on this machine. ``faults``: what becomes of its next answers to reads;
    ``fail_every`` = n: each n-th request, of any kind, is answered with 500; ``asked``: all methods
    and paths so far."""
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    app, faults, asked = DomainDispatcherApplication(create_backend_app), [], []

    def faulty(environ, start_response):
        asked.append((environ["REQUEST_METHOD"], environ["PATH_INFO"]))
        if http.fail_every and len(asked) % http.fail_every == 0:
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            start_response("500 Oops", [("Content-Length", "0")])
            return []
        if faults and environ["REQUEST_METHOD"] in ("GET", "HEAD"):
            fault = faults.pop(0)
            if fault == "reset":
                environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
                raise ConnectionAbortedError("a fault on purpose")
            start_response(fault, [("Content-Length", "0")])
            return []
        return app(environ, start_response)

    logging.getLogger("werkzeug").setLevel(logging.CRITICAL)
    http = make_server("127.0.0.1", 0, faulty, threaded=True)
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.05})
    http.faults, http.asked, http.fail_every = faults, asked, 0
    thread.start()
    yield http
    http.shutdown()
    thread.join()
    http.server_close()


@pytest.fixture
def bucket(server, tmp_path, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv(remote.CACHE, str(tmp_path / "cache"))
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    s3 = fsspec.filesystem("s3", skip_instance_cache=True)
    if not s3.exists("bucket"):
        s3.mkdir("bucket")
    elif s3.exists("bucket/run"):
        s3.rm("bucket/run", recursive=True)
    server.faults.clear()
    server.fail_every = 0
    return s3
