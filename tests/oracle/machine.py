"""A QEMU whose processor stands still: disks to write to by qemu-io, at once and without a guest."""

import json
import pathlib
import socket
import subprocess

from .guest import die_with_parent

TIMEOUT = 60


class Machine:
    """Disk number N is device `diskN`. `monitor` is free for the plugin.

    A disk is a dict: `size`, and if need be `format` (qcow2), `options` of its device.
    Images that exist already are kept, so a machine can be started again.
    """

    def __init__(self, folder, disks, qemu="qemu-system-x86_64", arguments=()):
        self.folder = pathlib.Path(folder)
        self.monitor, own = str(self.folder / "qmp.sock"), str(self.folder / "own.sock")
        command = [qemu, "-S", "-machine", "q35", "-accel", "tcg", "-nodefaults", "-display", "none",
                   "-qmp", f"unix:{self.monitor},server=on,wait=off", *arguments]
        for number, disk in enumerate(disks):
            command += self._disk(number, disk)
        # QEMU connects to this one: its greeting says that the other one listens.
        (self.folder / "own.sock").unlink(missing_ok=True)
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(own)
        listener.listen()
        listener.settimeout(TIMEOUT)
        command += ["-chardev", f"socket,id=own,path={own}", "-mon", "chardev=own,mode=control"]
        self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                                        preexec_fn=die_with_parent)
        with listener:
            connection, _ = listener.accept()
        self._connection, self._lines = connection, connection.makefile("rb")
        json.loads(self._lines.readline())
        self.execute("qmp_capabilities")

    def _disk(self, number, disk):
        kind = disk.get("format", "qcow2")
        image = self.folder / f"disk{number}.{kind}"
        if not image.exists():
            subprocess.run(["qemu-img", "create", "-q", "-f", kind, image, str(disk["size"])], check=True)
        node = f"driver={kind},node-name=node{number},discard=unmap,file.driver=file,file.filename={image}"
        device = f"virtio-blk-pci,drive=node{number},id=disk{number}{disk.get('options', '')}"
        return ["-blockdev", node, "-device", device]

    def execute(self, command, **arguments):
        """What QEMU returns; events are passed over."""
        self._connection.sendall(json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n")
        while True:
            answer = json.loads(self._lines.readline())
            if "error" in answer:
                raise AssertionError(f"{command}: {answer['error']['desc']}")
            if "return" in answer:
                return answer["return"]

    def command(self, name, arguments=None):
        """As of `Qmp`."""
        return self.execute(name, **(arguments or {}))

    def io(self, number, command):
        """Has qemu-io write to a disk, as a guest would."""
        device = f"/machine/peripheral/disk{number}/virtio-backend"
        printed = self.execute("human-monitor-command", **{"command-line": f'qemu-io -d {device} "{command}"'})
        if printed:
            raise AssertionError(f"{command}: {printed}")

    def quit(self):
        """In order: qcow2 stores its bitmaps."""
        self._connection.sendall(b'{"execute":"quit"}\n')
        self.process.wait(TIMEOUT)
        self.close()

    def close(self):
        """At once, as a crash."""
        self._lines.close()
        self._connection.close()
        self.process.kill()
        self.process.wait()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()
