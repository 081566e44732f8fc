"""A server on this host that stands in for one on the internet."""

import http.server
import threading


class QuietHandler(http.server.BaseHTTPRequestHandler):
    """A handler that prints nothing. It speaks HTTP/1.0: no connection outlives the server."""

    def log_message(self, *arguments: object) -> None:
        """Print nothing."""


def start_server(handler: type[QuietHandler]) -> tuple[http.server.ThreadingHTTPServer, str]:
    """Start answering; the server and its address."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server, f"http://127.0.0.1:{server.server_address[1]}"
