"""A collector of OpenTelemetry logs: prints its port, and what it is sent, a line for each record. Refuses
the first message for now, as a collector that is busy does."""
import http.server, json, signal, sys
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest

class Collector(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    busy = True
    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        status = 503 if Collector.busy else 200
        Collector.busy = False
        if status == 200 and self.path == "/v1/logs":
            assert self.headers["Content-Type"] == "application/x-protobuf"
            message = ExportLogsServiceRequest.FromString(body)
            for resource in message.resource_logs:
                about = {it.key: it.value.string_value for it in resource.resource.attributes}
                for scope in resource.scope_logs:
                    for record in scope.log_records:
                        values = {it.key: it.value.string_value or it.value.int_value for it in record.attributes}
                        print(json.dumps({
                            "service": about["service.name"], "event": record.event_name, "severity": record.severity_number,
                            "time": record.time_unix_nano, "body": record.body.string_value, "attributes": values,
                        }), flush=True)
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.end_headers()
    def log_message(self, *_): pass

server = http.server.HTTPServer(("127.0.0.1", 0), Collector)
# A test that waits for what never comes is to fail.
signal.alarm(60)
print(server.server_port, flush=True)
server.serve_forever()
