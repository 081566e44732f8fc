"""As much of W&B's protocol as a run needs to start and to stream its history, and as a view needs to be saved.

It answers, and dies when told to.
"""

import gzip
import json
import re
from typing import Any

from benchmarks.local_server import QuietHandler, start_server

VIEWER = {"id": "1", "entity": "me", "username": "me", "flags": "{}", "teams": {"edges": []}}
BUCKET = {"id": "1", "name": "run", "displayName": "run", "config": "{}", "historyLineCount": 0}
PROJECT = {"name": "lkd", "entity": {"name": "me"}}
LAST_PAGE = {"__typename": "PageInfo", "endCursor": None, "hasNextPage": False}
ANSWERS: dict[str, dict[str, Any]] = {
    "Viewer": {"viewer": VIEWER},
    "UpsertBucket": {"upsertBucket": {"inserted": True, "bucket": BUCKET | {"project": PROJECT}}},
    "CreateRunFiles": {"createRunFiles": {"runID": "1", "uploadHeaders": [], "files": []}},
    "GetDefaultEntity": {"viewer": {"id": "1", "entity": "me"}},
    "ProjectInternalId": {"project": {"internalId": "7"}},
    "GetProjects": {"models": {"pageInfo": LAST_PAGE, "edges": []}},
    "UpsertView2": {"upsertView": {"view": {"id": "v1", "name": "nw-abc-v"}, "inserted": True}},
}


def answer(content: dict[str, Any]) -> dict[str, Any]:
    """What the server says to a GraphQL request."""
    named = re.match(r"\s*(?:query|mutation)\s+(\w+)", content.get("query", ""))
    name = content.get("operationName") or (named and named[1])
    if name == "upsertView":  # a report, which comes back as it was sent
        sent = content["variables"]
        project = {"id": "7", "name": sent["projectName"], "entityName": sent["entityName"]}
        view = {"id": "r1", "name": "r1", "displayName": sent["displayName"], "description": "", "project": project}
        return {"upsertView": {"view": view | {"spec": sent["spec"]}, "inserted": True}}
    return ANSWERS.get(name, {})


class StandIn:
    """A server on this host.

    Attributes:
        requests: Path and body of every request.
    """

    def __init__(self) -> None:
        self.requests: list[tuple[str, dict[str, Any]]] = []
        stand_in = self

        class Handler(QuietHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("content-length", 0)))
                body = gzip.decompress(body) if self.headers.get("content-encoding") == "gzip" else body
                content = json.loads(body) if body.startswith(b"{") else {}  # else W&B's telemetry
                stand_in.requests.append((self.path, content))
                data = json.dumps({"data": answer(content)} if "graphql" in self.path else {}).encode()
                self.send_response(200)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

        self.server, self.address = start_server(Handler)

    def die(self) -> None:
        """Answer nobody any more."""
        self.server.shutdown()
        self.server.server_close()
