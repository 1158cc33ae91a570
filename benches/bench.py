"""Pull against nbdcopy, memory, and extents, as a table. See README.md beside this file."""

import argparse
import contextlib
import json
import os
import pathlib
import socket
import statistics
import subprocess
import tempfile
import time

GIB = 1 << 30
PLUGIN = os.environ["QEMU_FLEECE"]
READ = 1 << 20
ANSWER = b'"result":{"digest"'


class Daemon:
    """A fresh qemu-storage-daemon with disks disk0, disk1, ... and a monitor for the plugin."""

    def __init__(self, folder, images):
        self.folder = folder
        command = ["qemu-storage-daemon", "--chardev", "stdio,id=own", "--monitor", "chardev=own",
                   "--chardev", f"socket,id=m,path={folder}/qmp.sock,server=on,wait=off", "--monitor", "chardev=m"]
        for number, image in enumerate(images):
            command += ["--blockdev", f"driver=raw,node-name=disk{number},file.driver=file,file.filename={image}"]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)
        self.process.stdout.readline()
        self.ask("qmp_capabilities")

    def ask(self, command, **arguments):
        self.process.stdin.write(json.dumps({"execute": command, "arguments": arguments}) + "\n")
        while True:
            answer = json.loads(self.process.stdout.readline())
            if "error" in answer:
                raise SystemExit(f"{command}: {answer}")
            if "return" in answer:
                return answer["return"]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.communicate()


class Plugin:
    """The plugin with its standard output on a pipe, or a socket pair."""

    def __init__(self, folder, output="pipe"):
        self.folder = folder
        if output == "pipe":
            self.output, theirs = os.pipe()
        else:
            ours, theirs = socket.socketpair()
            self.output, theirs = ours.detach(), theirs.detach()
        command = [PLUGIN, "--scratch-dir", str(folder), "--runtime-dir", str(folder)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=theirs)
        os.close(theirs)
        self.ask(0, "hello", protocols=[1], host={"name": "bench", "version": "1"}, carrier="framed")
        self.line()

    def ask(self, number, method, **params):
        line = json.dumps({"jsonrpc": "2.0", "id": number, "method": method, "params": params})
        self.process.stdin.write(line.encode() + b"\n")
        self.process.stdin.flush()

    def line(self):
        """One line; for answers outside of streams."""
        line = b""
        while not line.endswith(b"\n"):
            line += os.read(self.output, 1)
        answer = json.loads(line)
        if "error" in answer:
            raise SystemExit(answer)
        return answer

    def begin(self, **params):
        self.ask(1, "backup.begin", monitor=f"{self.folder}/qmp.sock", **params)
        return self.line()["result"]

    def drain(self, backup, disks):
        """Reads all disks side by side and drops the bytes; seconds."""
        began = time.monotonic()
        for number, disk in enumerate(disks):
            self.ask(1000 + number, "backup.read", backup=backup, disk=disk)
        left, buffer, tail = len(disks), bytearray(READ), b""
        while left:
            length = os.readv(self.output, [buffer])
            if not length:
                raise SystemExit("the plugin ended")
            # An answer is the last word of its stream. Of one stream it is at the end of
            # what came; of several, anywhere.
            new = bytes(buffer[max(0, length - 8192) if len(disks) == 1 else 0:length])
            text = tail + new
            left -= text.count(ANSWER)
            tail = text[-len(ANSWER) + 1:]
        return time.monotonic() - began

    def peak(self):
        """Most memory that it ever had, in MiB."""
        status = pathlib.Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) / 1024

    def cpu(self):
        fields = pathlib.Path(f"/proc/{self.process.pid}/stat").read_text().split()
        return (int(fields[13]) + int(fields[14])) / os.sysconf("SC_CLK_TCK")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.stdin.close()
        os.close(self.output)
        self.process.wait()


def pull(folder, images, output="pipe"):
    """GiB/s, MiB of memory, CPU seconds per GiB."""
    total = sum(os.path.getsize(image) for image in images) / GIB
    with Daemon(folder, images), Plugin(folder, output) as plugin:
        began = plugin.begin()
        seconds = plugin.drain(began["backup"], [disk["disk"] for disk in began["disks"]])
        return total / seconds, plugin.peak(), plugin.cpu() / total


def nbdcopy(folder, image):
    """GiB/s of nbdcopy into a pipe whose reader drops the bytes."""
    with Daemon(folder, [image]) as daemon:
        path = f"{folder}/nbdcopy.sock"
        daemon.ask("nbd-server-start", addr={"type": "unix", "data": {"path": path}})
        daemon.ask("block-export-add", type="nbd", id="e", **{"node-name": "disk0"}, name="disk0")
        began = time.monotonic()
        copy = subprocess.Popen(["nbdcopy", f"nbd+unix:///disk0?socket={path}", "-"], stdout=subprocess.PIPE)
        buffer = bytearray(READ)
        while os.readv(copy.stdout.fileno(), [buffer]):
            pass
        seconds = time.monotonic() - began
        copy.stdout.close()
        if copy.wait():
            raise SystemExit("nbdcopy failed")
        os.unlink(path)
    return os.path.getsize(image) / GIB / seconds


def allocated(path, gib):
    """A file without a zero block."""
    with open("/dev/urandom", "rb") as random, open(path, "wb") as file:
        block = random.read(64 << 20)
        for number in range(gib * GIB // len(block)):
            file.write(number.to_bytes(8, "big") + block[8:])
    return path


def sparse(path, size, extents):
    """A sparse file with that many extents of data, evenly over its size."""
    with open(path, "wb") as file:
        file.truncate(size)
        step = size // extents // 65536 * 65536
        for number in range(extents):
            os.pwrite(file.fileno(), b"x" * 4096, number * step)
    return path


def extents(folder, size, count):
    """What listing the extents of a sparse disk took; seconds and MiB of a whole pull of it."""
    image = sparse(folder / "sparse", size, count)
    with Daemon(folder, [image]), Plugin(folder) as plugin:
        began = plugin.begin()
        (view,) = folder.glob("qf-*/nbd.sock")
        export = f"qf-{began['backup']}-0-acc"
        listed = subprocess.run([os.environ["EXTENTS"], view, export], check=True, capture_output=True, text=True)
        seconds = plugin.drain(began["backup"], ["disk0"])
        peak = plugin.peak()
    os.unlink(image)
    return listed.stdout.strip(), seconds, peak


def main():
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--gib", type=int, default=4)
    options.add_argument("--pairs", type=int, default=5)
    options = options.parse_args()
    with contextlib.ExitStack() as stack:
        folder = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fleece-bench-", dir="/dev/shm")))
        image = allocated(folder / "disk", options.gib)
        rows, ratios = {"pipe": [], "socketpair": [], "nbdcopy": []}, {"pipe": [], "socketpair": []}
        for _ in range(options.pairs):
            rows["nbdcopy"].append((nbdcopy(folder, image), 0, 0))
            for output in ("pipe", "socketpair"):
                rows[output].append(pull(folder, [image], output))
                ratios[output].append(rows[output][-1][0] / rows["nbdcopy"][-1][0])
        print(f"pull of {options.gib} GiB in memory, {options.pairs} pairs, medians (least to most)")
        for name, values in rows.items():
            speed, memory, cpu = zip(*values)
            more = ""
            if name in ratios:
                more = (f"  ratio {statistics.median(ratios[name]):.2f} ({min(ratios[name]):.2f} to {max(ratios[name]):.2f})"
                        f"  {max(memory):.0f} MiB  {statistics.median(cpu):.2f} CPU s/GiB")
            print(f"  {name:10}  {statistics.median(speed):.2f} GiB/s ({min(speed):.2f} to {max(speed):.2f}){more}")
        os.unlink(image)
        four = [allocated(folder / f"disk{number}", 1) for number in range(4)]
        speed, memory, _ = pull(folder, four)
        print(f"four disks side by side: {speed:.2f} GiB/s, {memory:.0f} MiB")
        for each in four:
            os.unlink(each)
        for size, count in [(1 << 36, 100_000), (1 << 40, 100_000), (1 << 40, 10)]:
            listed, seconds, memory = extents(folder, size, count)
            print(f"sparse disk of {size / GIB:.0f} GiB with {count} times 4 KiB of data: listed {listed};"
                  f" pulled whole in {seconds:.2f} s, {memory:.0f} MiB")


if __name__ == "__main__":
    main()
