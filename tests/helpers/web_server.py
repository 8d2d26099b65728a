"""A web server in this process, for what is downloaded."""

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest

from slak_mm import _files


@pytest.fixture
def server(monkeypatch):
    """A web server: ``files`` by path, requests in ``log``; knows Range, and can break off."""
    monkeypatch.setenv('no_proxy', '127.0.0.1')
    monkeypatch.setattr(_files.time, 'sleep', lambda seconds: None)
    state = SimpleNamespace(files={}, log=[], break_after=None, ranges=True, etag='"1"')

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            content = state.files.get(self.path)
            wanted = self.headers.get('Range')
            state.log.append((self.path, wanted))
            if content is None:
                self.send_error(404)
                return
            begin = 0
            if wanted and state.ranges and self.headers.get('If-Range') == state.etag:
                begin = int(wanted.removeprefix('bytes=').rstrip('-'))
                if begin >= len(content):
                    self.send_response(416)
                    self.send_header('Content-Range', f'bytes */{len(content)}')
                    self.end_headers()
                    return
                self.send_response(206)
                self.send_header('Content-Range', f'bytes {begin}-{len(content) - 1}/{len(content)}')
            else:
                self.send_response(200)
            self.send_header('Content-Length', str(len(content) - begin))
            self.send_header('ETag', state.etag)
            self.send_header('Content-Type', 'text/html' if self.path.endswith('.html') else 'application/octet-stream')
            self.end_headers()
            end = len(content)
            if state.break_after is not None:
                end, state.break_after = min(end, begin + state.break_after), None
            self.wfile.write(content[begin:end])

        def log_message(self, *args):
            pass

    http = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    thread = threading.Thread(target=http.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    state.url = f'http://127.0.0.1:{http.server_address[1]}'
    yield state
    http.shutdown()
    http.server_close()
