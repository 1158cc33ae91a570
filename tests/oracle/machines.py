"""Machines without a guest, their images, and what connects to their monitors."""

import json
import pathlib
import shutil
import socket
import subprocess
import tempfile
import threading

from .guest import die_with_parent

QEMU = "qemu-system-x86_64"
DAEMON = "qemu-storage-daemon"


class Machine:
    """A process of QEMU's with three monitors, in a folder of its own; leaving `with` kills it."""

    def __init__(self, command, *style):
        self.folder = pathlib.Path(tempfile.mkdtemp(prefix="fleece-machine-"))
        self.qmp = [str(self.folder / f"qmp{n}") for n in range(3)]
        self.process = spawn_with_monitors(command, self.qmp, self.folder, *style)

    def close(self):
        self.process.kill()
        self.process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


class Vm(Machine):
    """A QEMU whose processor does not run; `io` writes as its guest would. Has these disks."""

    def __init__(self, arguments, qemu=QEMU):
        self.qemu = qemu
        start = [qemu, "-S", "-machine", "q35", "-accel", "tcg", "-nodefaults", "-display", "none"]
        super().__init__([*start, *arguments])


class Daemon(Machine):
    """A qemu-storage-daemon with these images."""

    def __init__(self, arguments, program=DAEMON):
        super().__init__([program, *arguments], "--chardev", "--monitor", "chardev={}")


def spawn_with_monitors(command, paths, folder, chardev="-chardev", mon="-mon", value="chardev={},mode=control"):
    """Starts QEMU with monitors on sockets that listen already: nobody waits for them."""
    listeners = []
    for number, path in enumerate(paths):
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(path)
        listener.listen()
        listeners.append(listener)
        name = f"monitor{number}"
        command += [chardev, f"socket,id={name},fd={listener.fileno()},server=on,wait=off"]
        command += [mon, value.format(name)]
    with open(folder / "qemu.log", "wb") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            pass_fds=[listener.fileno() for listener in listeners],
            preexec_fn=die_with_parent,
        )
    for listener in listeners:
        listener.close()
    return process


def io(qmp, device, command):
    line = f'qemu-io -d {device} "{command}"'
    said = qmp.command("human-monitor-command", {"command-line": line})
    if "error" in said.lower() or "failed" in said.lower():
        raise AssertionError(f"{command}: {said}")


def make_image(path, format="qcow2", size="16M", *options):
    subprocess.run(["qemu-img", "create", "-q", "-f", format, *options, str(path), str(size)], check=True)


def blockdev(node, path, format):
    """An image's options."""
    file = {"driver": "file", "filename": str(path), "discard": "unmap"}
    return json.dumps({"driver": format, "node-name": node, "discard": "unmap", "file": file})


def virtio(node, path, format="qcow2", device=None):
    """Arguments of one virtio-blk disk: its device is `device`, else `dev-NODE`."""
    name = device or f"dev-{node}"
    return ["-blockdev", blockdev(node, path, format), "-device", f"virtio-blk-pci,drive={node},id={name}"]


class Relay:
    """TCP on this machine to a unix socket, for one client at a time: descriptors cannot pass.

    With `tls`, a context of a server's, the TCP side is encrypted.
    """

    def __init__(self, path, tls=None):
        self._path, self._tls = path, tls
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"tcp:127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self):
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            if self._tls:
                client = self._tls.wrap_socket(client, server_side=True)
            with client, socket.socket(socket.AF_UNIX) as server:
                server.connect(self._path)
                back = threading.Thread(target=self._pump, args=(server, client))
                back.start()
                self._pump(client, server)
                back.join()

    @staticmethod
    def _pump(source, sink):
        try:
            while data := source.recv(65536):
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # The other direction has seen the end.

    def close(self):
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
