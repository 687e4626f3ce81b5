"""A web application that fetches what a visitor names, with the method and header that they name."""
import sys
import urllib.error
import urllib.parse
import urllib.request
from http.server import BaseHTTPRequestHandler, HTTPServer


class Application(BaseHTTPRequestHandler):
    def do_GET(self):
        asked = dict(urllib.parse.parse_qsl(urllib.parse.urlsplit(self.path).query))
        request = urllib.request.Request(asked["url"], method=asked.get("method", "GET"))
        if "header" in asked:
            request.add_header(*asked["header"].split(": ", 1))
        try:
            with urllib.request.urlopen(request, timeout=20) as answer:
                status, body = answer.status, answer.read()
        except urllib.error.HTTPError as error:
            status, body = error.code, error.read()
        self.send_response(status)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


server = HTTPServer(("", 8080), Application)
print("ready", flush=True)
server.serve_forever()
