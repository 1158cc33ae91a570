"""The conversation with the plugin: requests out; replies, records and notices in.

One thread reads all that the plugin says, so the plugin never waits for a
host that is busy with something else. A record goes straight to the function
that its request brought along; a store that is slow slows its stream down.
"""
import base64
import concurrent.futures
import json
import socket
import subprocess
import threading
import time

from . import VERSION

PROTOCOL = 1
# Until `hello` has told the plugin's own limits.
FIRST_LIMITS = {"max_line_bytes": 16 << 20, "max_payload_bytes": 1 << 20, "max_requests": 4}
# Of `max_requests`, kept free: a commit or shutdown must never wait for a stream.
SPARE_REQUESTS = 2
HELLO_SECONDS = 30
# `shutdown` removes what is open in QEMU first.
SHUTDOWN_SECONDS = 60
EXIT_SECONDS = 10


class PluginError(Exception):
    """The plugin's error reply: `code`, `action`, `data` (section 8)."""

    def __init__(self, method, error):
        error = error if isinstance(error, dict) else {}
        data = error.get("data")
        self.method = method
        self.data = data if isinstance(data, dict) else {}
        self.code = self.data.get("code", "unknown")
        self.action = self.data.get("action", "report_bug")
        more = "".join(", %s %s" % (name, self.data[name])
                       for name in ("disk", "stream", "offset", "reason", "state_left",
                                    "leftovers")
                       if self.data.get(name) not in (None, []))
        super().__init__("%s: %s [code %s, action %s%s]" % (
            method, error.get("message", "no message"), self.code, self.action, more))


class PluginGone(Exception):
    """The plugin ended, or broke the protocol, while it was needed."""


class Plugin:
    """A running plugin that has said `hello`; a `with` block ends it in order.

    `on_notice(method, params)` gets the notifications that are no records.
    `stderr` is as for subprocess: by default the plugin's log joins ours.
    """

    def __init__(self, command, carrier="framed", on_notice=None, stderr=None):
        self.limits = dict(FIRST_LIMITS)
        self.last_heard = time.monotonic()
        self._carrier = carrier
        self._on_notice = on_notice or (lambda method, params: None)
        self._calls = {}
        self._next_id = 1
        self._lost = None
        self._cut = False
        self._state = threading.Lock()
        self._sending = threading.Lock()
        # A socket pair moves large payloads faster than a pipe.
        ours, theirs = socket.socketpair()
        try:
            # A session of its own: Ctrl-C reaches the host only, which then ends
            # the plugin in order. Should the host die, end of file tells it.
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=theirs, stderr=stderr,
                start_new_session=True)
        except OSError as error:
            ours.close()
            raise PluginGone("cannot start %s: %s" % (command[0], error)) from None
        finally:
            theirs.close()
        self._socket, self._output = ours, ours.makefile("rb", buffering=1 << 20)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        try:
            self.hello = self.call("hello", {
                "protocols": [PROTOCOL], "carrier": carrier,
                "host": {"name": "qemu-fleece-host", "version": VERSION},
            }, seconds=HELLO_SECONDS)
            self._agree()
        except BaseException:
            self.close()
            raise

    def _agree(self):
        hello = self.hello
        if hello.get("protocol") != PROTOCOL or hello.get("carrier") != self._carrier:
            raise PluginGone("the plugin agreed to protocol %r, carrier %r"
                             % (hello.get("protocol"), hello.get("carrier")))
        limits = hello.get("limits")
        self.limits.update(limits if isinstance(limits, dict) else {})
        bulk = max(1, self.limits["max_requests"] - SPARE_REQUESTS)
        self._slots = threading.BoundedSemaphore(bulk)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def call(self, method, params, seconds=None):
        """Asks and waits: the result, or PluginError, PluginGone, TimeoutError."""
        future = self._send(method, params)
        try:
            return future.result(seconds)
        except concurrent.futures.TimeoutError:
            raise TimeoutError("%s: no reply in %d seconds" % (method, seconds)) from None

    def start(self, method, params, payload=None, on_record=None):
        """Asks and goes on: a future. Waits only while too many are unanswered.

        `on_record(record, payload)` runs in the reading thread; what it raises
        ends the future, and the rest of that stream is dropped.
        """
        self._slots.acquire()
        try:
            future = self._send(method, params, payload, on_record)
        except BaseException:
            self._slots.release()
            raise
        future.add_done_callback(lambda _: self._slots.release())
        return future

    def close(self):
        """Ends the plugin; it aborts what is open. Returns what it could not remove."""
        leftovers = []
        try:
            # Behind half a message no other can follow: then only end of file helps.
            if not self._cut:
                leftovers = self.call("shutdown", {}, SHUTDOWN_SECONDS).get("leftovers", [])
        except (PluginError, PluginGone, TimeoutError):
            pass
        try:
            self._process.stdin.close()
        except OSError:
            pass
        for end in (lambda: None, self._hang_up, self._process.terminate, self._process.kill):
            end()
            try:
                self._process.wait(EXIT_SECONDS)
                break
            except subprocess.TimeoutExpired:
                pass
        self._hang_up()
        self._reader.join()
        self._output.close()
        self._socket.close()
        return leftovers

    def _hang_up(self):
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass

    def _send(self, method, params, payload=None, on_record=None):
        future = concurrent.futures.Future()
        message = {"jsonrpc": "2.0", "method": method, "params": params}
        if payload is not None and self._carrier == "framed":
            message["payload_bytes"] = len(payload)
        elif payload is not None:
            params["data"] = base64.b64encode(payload).decode("ascii")
            payload = None
        with self._state:
            if self._lost:
                raise PluginGone(self._lost)
            message["id"] = self._next_id
            self._calls[self._next_id] = (method, future, on_record)
            self._next_id += 1
        line = json.dumps(message, separators=(",", ":")).encode("ascii") + b"\n"
        try:
            with self._sending:
                self._cut = True
                self._process.stdin.write(line)
                if payload is not None:
                    self._process.stdin.write(payload)
                self._process.stdin.flush()
                self._cut = False
        except (OSError, ValueError):
            # The reader finds out why, and tells all that wait.
            pass
        return future

    def _read(self):
        try:
            while True:
                message, payload = self._read_message()
                self.last_heard = time.monotonic()
                self._dispatch(message, payload)
        except Exception as error:  # whatever it is: nobody may wait for ever
            self._lose(error if isinstance(error, PluginGone)
                       else PluginGone("the plugin broke the protocol: %r" % error))

    def _read_message(self):
        limit = self.limits["max_line_bytes"]
        try:
            line = self._output.readline(limit + 1)
        except OSError:
            line = b""
        if not line:
            raise PluginGone(self._how_it_ended())
        if not line.endswith(b"\n"):
            if len(line) > limit:
                raise PluginGone("the plugin sent a line of more than %d bytes" % limit)
            raise PluginGone(self._how_it_ended() + " in the middle of a line")
        message = json.loads(line.decode("utf-8"))
        size = message.get("payload_bytes", 0)
        if type(size) is not int or not 0 <= size <= self.limits["max_payload_bytes"]:
            raise ValueError("payload_bytes is %r" % (size,))
        payload = None
        if "payload_bytes" in message:
            payload = self._output.read(size)
            if len(payload) < size:
                raise PluginGone(self._how_it_ended() + " in the middle of a payload")
        return message, payload

    def _how_it_ended(self):
        try:
            return "the plugin ended with status %d" % self._process.wait(EXIT_SECONDS)
        except subprocess.TimeoutExpired:
            return "the plugin closed its output"

    def _dispatch(self, message, payload):
        method = message.get("method")
        if method == "record":
            self._take_record(message["params"], payload)
        elif method is not None:
            self._on_notice(method, message.get("params", {}))
        else:
            with self._state:
                call = self._calls.pop(message["id"], None)
            if call is None:
                raise ValueError("an answer to no request: %.200r" % (message,))
            name, future, _ = call
            if "error" in message:
                _settle(future, error=PluginError(name, message["error"]))
            else:
                _settle(future, result=message["result"])

    def _take_record(self, params, payload):
        with self._state:
            call = self._calls.get(params["stream"])
        if call is None or call[2] is None:
            raise ValueError("a record of no stream")
        _, future, on_record = call
        if future.done():
            return
        if "data" in params:
            payload = base64.b64decode(params["data"], validate=True)
        try:
            on_record(params["record"], payload)
        except Exception as error:
            _settle(future, error=error)

    def _lose(self, why):
        with self._state:
            self._lost = str(why)
            calls, self._calls = self._calls, {}
        for _, future, _ in calls.values():
            _settle(future, error=PluginGone(self._lost))


def _settle(future, result=None, error=None):
    """First word counts: a stream whose store failed is still answered later."""
    if future.done():
        return
    if error is not None:
        future.set_exception(error)
    else:
        future.set_result(result)
