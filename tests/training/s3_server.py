"""A server that speaks as much of S3 as reading asks for: objects in ranges, lists of them, refusals."""

import http.server
import threading
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

KEY = "the-key"


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        self.server.asked.append(self.path)
        url = urlsplit(self.path)
        bucket, _, name = unquote(url.path).lstrip("/").partition("/")
        match self.server.faults.pop(0) if self.server.faults else "":
            case "busy":
                return self._refuse(503, "SlowDown", "Please reduce your request rate.")
            case "silent":
                self.server.over.wait()
                return
        if f"Credential={KEY}/" not in self.headers.get("Authorization", ""):
            return self._refuse(403, "InvalidAccessKeyId", "The key is not in our records.")
        if bucket != "bucket":
            return self._refuse(404, "NoSuchBucket", "The specified bucket does not exist")
        if "list-type" in (query := parse_qs(url.query, keep_blank_values=True)):
            return self._answer(200, _listing(self.server.objects, query).encode(), "application/xml")
        if name not in self.server.objects:
            return self._refuse(404, "NoSuchKey", "The specified key does not exist.")
        return self._object(self.server.objects[name])

    def _object(self, data):
        asked = self.headers.get("Range")
        if asked is None:
            return self._answer(200, data)
        first, last = (int(place) for place in asked.removeprefix("bytes=").split("-"))
        part = data[first : last + 1]
        return self._answer(206, part, Content_Range=f"bytes {first}-{first + len(part) - 1}/{len(data)}")

    def _refuse(self, status, code, message):
        body = f"<Error><Code>{code}</Code><Message>{message}</Message></Error>"
        self._answer(status, body.encode(), "application/xml")

    def _answer(self, status, body, kind="binary/octet-stream", **headers):
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{len(body):032x}"')
        self.send_header("Last-Modified", "Wed, 01 Jan 2025 00:00:00 GMT")
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


def _listing(objects, query):
    prefix, delimiter = query.get("prefix", [""])[0], query.get("delimiter", [""])[0]
    files, folders = [], set()
    for name, data in sorted(objects.items()):
        if name.startswith(prefix):
            head, found, _ = name[len(prefix) :].partition(delimiter) if delimiter else (name, "", "")
            if found:
                folders.add(prefix + head + found)
            else:
                files.append(f"<Contents><Key>{escape(name)}</Key><Size>{len(data)}</Size><ETag>{len(data)}</ETag>"
                             "<LastModified>2025-01-01T00:00:00Z</LastModified></Contents>")  # fmt: skip
    common = [f"<CommonPrefixes><Prefix>{escape(name)}</Prefix></CommonPrefixes>" for name in sorted(folders)]
    head = f"<Name>bucket</Name><KeyCount>{len(files) + len(common)}</KeyCount><IsTruncated>false</IsTruncated>"
    return f"<ListBucketResult>{head}{''.join(files + common)}</ListBucketResult>"


class Server(http.server.ThreadingHTTPServer):
    """`objects` of the one bucket, named "bucket"; `faults` that come first ("busy", "silent"); `asked`: the paths."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.objects, self.faults, self.asked, self.over = {}, [], [], threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}"

    def __enter__(self):
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error):
        self.over.set()
        self.shutdown()
        self.server_close()
