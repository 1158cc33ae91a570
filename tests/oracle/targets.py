"""What a push writes to: real servers that can be made to misbehave, and their certificates."""

import collections
import contextlib
import os
import pathlib
import re
import signal
import socket
import subprocess
import time

from .guest import die_with_parent

# The program takes over a socket that listens already: nobody has to wait for it to appear.
ACTIVATE = 'export LISTEN_PID=$$ LISTEN_FDS=1; exec "$0" "$@" 3<&0 </dev/null'
CHANGES = ("Write", "Zero", "Trim")
LINE = re.compile(
    r"connection=(?P<connection>\d+) (?P<done>\.\.\.)?(?P<name>Write|Zero|Trim|Flush) id=(?P<id>\d+)"
    r"(?: offset=(?P<offset>\w+) count=(?P<count>\w+))?(?:.* ?return=(?P<answer>-?\d+))?"
)

Request = collections.namedtuple("Request", "done name key offset count answer")


def until(holds, seconds=30):
    """Looks until it holds, and returns what it holds."""
    deadline = time.monotonic() + seconds
    while not (found := holds()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"not so after {seconds} s")
        time.sleep(0.01)
    return found


class Server:
    """A program that serves NBD on a unix socket at `path`, or on a free port of this machine."""

    def __init__(self, command, path=None):
        if path:
            listener = socket.socket(socket.AF_UNIX)
            listener.bind(str(path))
            listener.listen()
            self.address = f"unix:{path}"
        else:
            listener = socket.create_server(("127.0.0.1", 0))
            self.address = f"tcp:127.0.0.1:{listener.getsockname()[1]}"
        with listener:
            self.process = subprocess.Popen(
                ["sh", "-c", ACTIVATE, *map(str, command)],
                stdin=listener,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,  # Failures that are asked for.
                preexec_fn=die_with_parent,
                start_new_session=True,
            )

    def target(self, **more):
        return {"kind": "nbd", "address": self.address, **more}

    def suspend(self):
        """From here on it takes nothing and answers nothing, and its connections stay."""
        self.process.send_signal(signal.SIGSTOP)
        tasks = pathlib.Path(f"/proc/{self.process.pid}/task")
        until(lambda: all("State:\tT" in status.read_text() for status in tasks.glob("*/status")))

    def resume(self):
        self.process.send_signal(signal.SIGCONT)

    def kill(self):
        self.process.kill()
        self.process.wait()

    def close(self):
        with contextlib.suppress(ProcessLookupError):  # It was closed before.
            # With the scripts that it has started.
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


class Nbdkit(Server):
    """An nbdkit that logs its requests; `plugin` is file, with `image`, if no other is named."""

    def __init__(self, image, log, *parameters, options=(), filters=(), plugin=(), path=None):
        self.image, self.log = image, log
        command = ["nbdkit", "-f", *options, "--filter=log", *(f"--filter={name}" for name in filters)]
        super().__init__([*command, *(plugin or ["file", image]), *parameters, f"logfile={log}"], path)

    def requests(self):
        """The beginnings and ends of requests that change something or flush, in their order."""
        found = []
        for match in LINE.finditer(self.log.read_text() if self.log.exists() else ""):
            key = (match["connection"], match["id"])
            offset, count = (int(match[name] or "0", 16) for name in ("offset", "count"))
            found.append(Request(bool(match["done"]), match["name"], key, offset, count, match["answer"]))
        return found

    def changes(self):
        """The changes that were asked for."""
        return [each for each in self.requests() if each.name in CHANGES and not each.done]

    def wait_changes(self, number, push=None):
        """Returns when so many have been asked for: a push is in its middle. Or when it has ended."""
        until(lambda: len(self.changes()) >= number or push and push.done())

    def most_at_once(self):
        """The most changes that were under way at a time."""
        most, now = 0, set()
        for each in self.requests():
            if each.name in CHANGES:
                (now.discard if each.done else now.add)(each.key)
            most = max(most, len(now))
        return most

    def flushed(self):
        """Whether a flush that began after the end of the last change has succeeded."""
        requests = self.requests()
        last = max((n for n, each in enumerate(requests) if each.name in CHANGES), default=-1)
        after = [each for each in requests[last + 1 :] if each.name == "Flush"]
        begun = {each.key for each in after if not each.done}
        return any(each.done and each.key in begun and each.answer == "0" for each in after)


def scripts(image, **more):
    """nbdkit's eval plugin over an image: each method is a shell script, which `more` replaces."""
    dd = f"dd status=none if={image} skip=$4 count=$3 iflag=skip_bytes,count_bytes"
    methods = {
        "get_size": f"stat -c %s {image}",
        "pread": dd,
        "pwrite": f"dd status=none of={image} seek=$4 oflag=seek_bytes conv=notrunc",
        "flush": f"sync {image}",
        **more,
    }
    return ["eval", *(f"{name}={script}" for name, script in methods.items())]


class Authority:
    """Makes folders of certificates as QEMU and nbdkit know them."""

    def __init__(self, folder):
        self.folder = folder
        folder.mkdir()
        key, cert = folder / "key.pem", folder / "cert.pem"
        extensions = ["basicConstraints=critical,CA:TRUE", "keyUsage=critical,keyCertSign"]
        self._openssl("req", "-x509", *self._new("authority", key, extensions), "-days", "2", "-out", cert)

    def issue(self, role, name=None):
        """The folder of a `server`, or a `client` that has a certificate of its own if it has a name."""
        folder = self.folder / f"{role}-{name}"
        folder.mkdir()
        (folder / "ca-cert.pem").write_bytes((self.folder / "cert.pem").read_bytes())
        if name:
            request, cert = folder / "request.pem", folder / f"{role}-cert.pem"
            extensions = ["basicConstraints=critical,CA:FALSE", f"extendedKeyUsage={role}Auth"]
            extensions += ["keyUsage=critical,digitalSignature,keyEncipherment"]
            extensions += [f"subjectAltName=DNS:{name},IP:127.0.0.1"]
            self._openssl("req", *self._new(name, folder / f"{role}-key.pem", extensions), "-out", request)
            sign = ["-CA", self.folder / "cert.pem", "-CAkey", self.folder / "key.pem", "-CAcreateserial"]
            self._openssl("x509", "-req", "-in", request, *sign, "-days", "2", "-copy_extensions", "copy", "-out", cert)
        return folder

    @staticmethod
    def _new(name, key, extensions):
        curve = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
        added = [word for extension in extensions for word in ("-addext", extension)]
        return [*curve, "-keyout", key, "-subj", f"/CN={name}", *added]

    @staticmethod
    def _openssl(*arguments):
        subprocess.run(["openssl", *map(str, arguments)], check=True, capture_output=True)
