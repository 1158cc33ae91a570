"""Boots the test guest (tests/setup/guest) and talks to the agent inside it."""

import ctypes
import dataclasses
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
RIG = pathlib.Path(os.environ.get("QEMU_FLEECE_RIG", ROOT / "target/rig"))
MIB = 1 << 20
AGENT_PORT = "org.qemu.guest_agent.0"


@dataclasses.dataclass
class Disk:
    """A disk to make; disk number N is node, serial number and agent's target `diskN`."""

    size: int = 64 * MIB
    format: str = "qcow2"  # or raw
    cluster_size: int = 65536  # of qcow2
    driver: str = "virtio-blk"  # or virtio-scsi, nvme
    iothread: bool = False
    image: str = ""  # one that is there already; "": a new one


def all_write(run, count):
    """Returns when each of so many writers, w0, w1 and so on, has written once more."""
    for number in range(count):
        def writes():
            return int(run(f"stat w{number}").split()[0].removeprefix("writes="))

        before, end = writes(), time.monotonic() + 60
        while writes() == before:
            if time.monotonic() > end:
                raise TimeoutError(f"w{number} has written nothing for a minute")


class GuestError(Exception):
    """The agent answered with an error, or the guest is gone."""


class Guest:
    """A running guest. `qmp` are the paths of three monitors, `images` those of the disks.

    `agent` is the socket of QEMU's guest agent, which runs in it from `start_agent` on.
    Leaving the `with` block kills QEMU and removes the folder with all files.
    """

    def __init__(self, disks, qemu="qemu-system-x86_64", memory=256, cpus=1, arguments=()):
        self.folder = pathlib.Path(tempfile.mkdtemp(prefix="fleece-guest-"))
        self.qmp = [str(self.folder / f"qmp{n}") for n in range(3)]
        self.agent = str(self.folder / "agent")
        self.images = [
            disk.image or str(self.folder / f"disk{n}.{disk.format}") for n, disk in enumerate(disks)
        ]
        self._lock = threading.Lock()
        self.process = self._control = None
        try:
            self._boot(disks, qemu, memory, cpus, arguments)
        except BaseException:
            self.close()
            raise

    def _boot(self, disks, qemu, memory, cpus, arguments):
        # The socket listens before QEMU runs: nobody has to wait for it to appear.
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(self.folder / "control"))
        listener.listen()
        # Emulation works everywhere; a /dev/kvm that can be opened may still not run a guest. One
        # processor: an emulated second one has been seen to lose its timer, and Linux hung there.
        command = [qemu, "-machine", "q35", "-accel", "tcg", "-cpu", "max"]
        command += ["-smp", str(cpus), "-m", str(memory), "-nodefaults", "-display", "none"]
        command += ["-no-reboot", "-kernel", RIG / "guest/vmlinuz", "-initrd", RIG / "guest/initrd"]
        command += ["-append", "console=ttyS0 quiet panic=-1 no_timer_check"]
        command += ["-serial", f"file:{self.folder}/console"]
        command += ["-chardev", f"socket,id=control,fd={listener.fileno()},server=on,wait=off"]
        command += ["-serial", "chardev:control"]
        for path in self.qmp:
            command += ["-qmp", f"unix:{path},server=on,wait=off"]
        command += ["-chardev", f"socket,id=agent,path={self.agent},server=on,wait=off"]
        command += ["-device", "virtio-serial-pci"]
        command += ["-device", f"virtserialport,chardev=agent,name={AGENT_PORT}"]
        for number, disk in enumerate(disks):
            command += self._disk(number, disk)
        command += arguments
        with listener, open(self.folder / "qemu.log", "wb") as log:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[listener.fileno()],
                preexec_fn=die_with_parent,
            )
        self._control = socket.socket(socket.AF_UNIX)
        self._control.settimeout(120)
        self._control.connect(str(self.folder / "control"))
        self._lines = self._control.makefile("rb")
        began = time.monotonic()
        self._answer("booting")
        self.boot_seconds = time.monotonic() - began

    def _disk(self, number, disk):
        image = self.images[number]
        options = ["-o", f"cluster_size={disk.cluster_size}"] if disk.format == "qcow2" else []
        create = ["qemu-img", "create", "-q", "-f", disk.format, *options, image, str(disk.size)]
        if not disk.image:
            subprocess.run(create, check=True)
        name = f"disk{number}"
        file = {"driver": "file", "filename": image, "discard": "unmap"}
        node = {"driver": disk.format, "node-name": name, "discard": "unmap", "file": file}
        arguments = ["-blockdev", json.dumps(node)]
        iothread = ""
        if disk.iothread:
            arguments += ["-object", f"iothread,id=io{number}"]
            iothread = f",iothread=io{number}"
        end = f"drive={name},serial={name},id=dev{number}"
        if disk.driver == "virtio-blk":
            arguments += ["-device", f"virtio-blk-pci,{end}{iothread}"]
        elif disk.driver == "virtio-scsi":
            arguments += ["-device", f"virtio-scsi-pci,id=scsi{number}{iothread}"]
            arguments += ["-device", f"scsi-hd,bus=scsi{number}.0,{end}"]
        elif disk.driver == "nvme" and not disk.iothread:
            arguments += ["-device", f"nvme,{end}"]
        else:
            raise ValueError(f"no such disk: {disk}")
        return arguments

    def run(self, command):
        """Has the agent do a command (tests/README.md); the answer without its `ok`."""
        with self._lock:
            self._control.sendall(command.encode() + b"\n")
            return self._answer(command)

    def start_agent(self, *options):
        """Starts QEMU's guest agent: its process id. It answers a moment later."""
        name = "/sys/class/virtio-ports/*/name"
        self.run(f"sh mkdir -p /run && qemu-ga -d -t /run -f /run/qemu-ga.pid {' '.join(options)}"
                 f" -p /dev/$(basename $(dirname $(grep -lx {AGENT_PORT} {name})))")
        return int(self.run("sh cat /run/qemu-ga.pid"))

    def stat(self, command):
        """The numbers that `stat NAME` or `stop NAME` answers."""
        words = (word.split("=") for word in self.run(command).split())
        return {name: int(value) for name, value in words}

    def _answer(self, command):
        try:
            answer = self._lines.readline().decode().rstrip("\n")
        except OSError as error:
            answer = str(error)
        kind, _, text = answer.partition(" ")
        if kind not in ("ok", "ready"):
            raise GuestError(f"{command}: {answer or 'the guest is gone'}\n{self.last_words()}")
        return text

    def last_words(self):
        """What QEMU and the guest's kernel said."""
        files = [self.folder / name for name in ("qemu.log", "console")]
        return "".join(file.read_text(errors="replace") for file in files if file.exists())

    def poweroff(self):
        """Orderly; returns when QEMU has ended. The images stay until `close`."""
        self.run("poweroff")
        self.process.wait(timeout=60)

    def close(self):
        if self._control:
            self._lines.close()
            self._control.close()
        if self.process:
            self.process.kill()
            self.process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def die_with_parent():
    """In QEMU's process: a test that is killed leaves no QEMU behind."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # 1 is PR_SET_PDEATHSIG


def pattern(seed, offset, length):
    """The bytes that the agent's `write` puts there."""
    mask = (1 << 64) - 1

    def mix(value):
        z = (value + 0x9E3779B97F4A7C15) & mask
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & mask
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB & mask
        return z ^ (z >> 31)

    key = mix(seed)
    words = range(offset // 8, (offset + length) // 8)
    return b"".join(mix(key ^ index).to_bytes(8, "little") for index in words)
