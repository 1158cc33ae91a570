"""What checkpoints cost: their methods, the guest's writes, QEMU's memory. See README.md beside this file."""

import argparse
import os
import pathlib
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path += [str(ROOT / "tests"), str(ROOT / "integrations/python")]
from fleece_host.plugin import Plugin  # noqa: E402
from oracle.guest import Disk, Guest  # noqa: E402
from oracle.machines import Daemon, blockdev  # noqa: E402
from oracle.qmp import Qmp  # noqa: E402

MIB, GIB, TIB = 1 << 20, 1 << 30, 1 << 40
COUNTS = (1, 16, 64)
SECONDS = 120


class Counter:
    """Between the plugin and a monitor: how many commands pass, and how many transactions."""

    def __init__(self, listen, monitor):
        self.commands = self.transactions = 0
        self._monitor = monitor
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(listen)
        self._listener.listen()
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self):
        while True:
            client, _ = self._listener.accept()
            server = socket.socket(socket.AF_UNIX)
            server.connect(self._monitor)
            threading.Thread(target=self._pass, args=(server, client), daemon=True).start()
            threading.Thread(target=self._pass, args=(client, server, True), daemon=True).start()

    def _pass(self, source, target, count=False):
        try:
            while data := source.recv(1 << 16):
                if count:
                    self.commands += data.count(b'"execute"')
                    self.transactions += data.count(b'"transaction"')
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # One of them is gone.


def plugin(folder):
    return Plugin([os.environ["QEMU_FLEECE"], "--scratch-dir", str(folder), "--runtime-dir", str(folder)])


def qcow2(path, size, *options):
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", *options, str(path), str(size)], check=True)
    return path


def methods(folder, disks, repeats):
    """One row for each number of checkpoints: time and commands of create, list and delete."""
    arguments = []
    for number in range(disks):
        image = qcow2(folder / f"{disks}-{number}.qcow2", GIB)
        arguments += ["--blockdev", blockdev(f"d{number}", image, "qcow2")]
    with Daemon(arguments) as daemon, plugin(folder) as host:
        counter = Counter(str(folder / f"qmp{disks}"), daemon.qmp[0])
        monitor = f"unix:{folder}/qmp{disks}"
        there = 0
        for count in COUNTS:
            for there in range(there, count):
                host.call("checkpoint.create", {"monitor": monitor, "checkpoint": f"n{there}"}, SECONDS)
            there = count
            rows = {"create": [], "list": [], "delete": []}
            for repeat in range(repeats):
                for method in rows:
                    params = {"create": {"checkpoint": "x"}, "list": {}, "delete": {"checkpoints": ["x"]}}[method]
                    before, began = (counter.commands, counter.transactions), time.monotonic()
                    host.call(f"checkpoint.{method}", {"monitor": monitor, **params}, SECONDS)
                    spent = time.monotonic() - began
                    rows[method].append((spent, counter.commands - before[0], counter.transactions - before[1]))
            yield count, rows


def report_methods(folder, repeats):
    """Exits with an error where a call needs more than one transaction, or asks disk by disk."""
    print("one call, milliseconds (commands to QEMU, transactions of these), medians")
    print("  disks  checkpoints  create          list            delete")
    commands = {}
    for disks in (1, 8, 32):
        for count, rows in methods(folder, disks, repeats):
            cells = []
            for method, values in rows.items():
                spent, asked, transactions = (sorted(column) for column in zip(*values))
                if transactions[-1] > 1 or asked[0] != asked[-1]:
                    raise SystemExit(f"{method} of {disks} disks: {transactions[-1]} transactions, {asked} commands")
                if commands.setdefault(method, asked[0]) != asked[0]:
                    raise SystemExit(f"{method} of {disks} disks takes {asked[0]} commands, and {commands[method]} before")
                cells.append(f"{statistics.median(spent) * 1000:6.1f} ({asked[0]}, {transactions[0]})")
            print(f"  {disks:5}  {count:11}  " + "  ".join(f"{cell:14}" for cell in cells))


def nbd_writes(folder, count, block, writes):
    """Writes a second to a disk that a storage daemon exports, with so many checkpoints."""
    image = qcow2(folder / "written.qcow2", 4 * GIB, "-o", "preallocation=metadata")
    path = folder / "nbd.sock"
    arguments = ["--blockdev", blockdev("d", image, "qcow2")]
    arguments += ["--nbd-server", f"addr.type=unix,addr.path={path}"]
    arguments += ["--export", "nbd,id=e,node-name=d,name=d,writable=on"]
    with Daemon(arguments) as daemon, plugin(folder) as host:
        monitor = f"unix:{daemon.qmp[0]}"
        # Once it answers, its NBD server listens.
        host.call("checkpoint.list", {"monitor": monitor}, SECONDS)
        for number in range(count):
            host.call("checkpoint.create", {"monitor": monitor, "checkpoint": f"n{number}"}, SECONDS)
        command = ["qemu-img", "bench", "-w", "-f", "raw", "-d", "8", "-c", str(writes), "-s", str(block)]
        command += ["-S", str(block + 65536), f"nbd+unix:///d?socket={path}"]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    image.unlink()
    path.unlink(missing_ok=True)
    return writes / float(re.search(r"completed in ([\d.]+) seconds", said).group(1))


def guest_writes(guest, host, monitor, count, seconds=3):
    """Writes with fdatasync a second, in a guest, with so many checkpoints."""
    for number in range(count):
        host.call("checkpoint.create", {"monitor": monitor, "checkpoint": f"n{number}"}, SECONDS)
    guest.run("start bench disk0 longest=4K")
    guest.run("stat bench")
    began = time.monotonic()
    time.sleep(seconds)
    said = guest.run("stop bench")
    spent = time.monotonic() - began
    if count:
        names = [f"n{number}" for number in range(count)]
        host.call("checkpoint.delete", {"monitor": monitor, "checkpoints": names}, SECONDS)
    return int(re.search(r"writes=(\d+)", said).group(1)) / spent


def ratios(title, measure, rounds):
    """Runs `measure` with 0 and each other number of checkpoints in turn."""
    rows = {count: [] for count in (0, *COUNTS)}
    for _ in range(rounds):
        for count, row in rows.items():
            row.append(measure(count))
    cells = []
    for count in COUNTS:
        each = [one / none for one, none in zip(rows[count], rows[0])]
        cells.append(f"{count}: {statistics.median(each):.2f} ({min(each):.2f} to {max(each):.2f})")
    print(f"  {title}, {statistics.median(rows[0]):.0f}/s without; with " + "   ".join(cells))


def memory(folder, count):
    """MiB that QEMU grows by with so many checkpoints of 1 TiB, untouched and all over dirty; how it ends."""
    image = qcow2(folder / "large.qcow2", TIB)
    empty = image.stat().st_blocks * 512
    with Daemon(["--blockdev", blockdev("d", image, "qcow2")]) as daemon, plugin(folder) as host, Qmp(daemon.qmp[1]) as qmp:
        monitor = f"unix:{daemon.qmp[0]}"

        def resident():
            status = pathlib.Path(f"/proc/{daemon.process.pid}/status").read_text()
            return int(re.search(r"VmRSS:\s+(\d+)", status).group(1)) / 1024

        host.call("checkpoint.list", {"monitor": monitor}, SECONDS)
        before = resident()
        for number in range(count):
            host.call("checkpoint.create", {"monitor": monitor, "checkpoint": f"n{number}"}, SECONDS)
        untouched = resident() - before
        # All of one is made dirty, and the others take that over.
        params = {"monitor": monitor, "checkpoint": "all", "disks": [{"disk": "d", "changed": "all"}]}
        host.call("checkpoint.redefine", params, SECONDS)
        for number in range(count):
            params = {"monitor": monitor, "checkpoint": f"n{number}", "from": [f"n{number}", "all"]}
            host.call("checkpoint.merge", params, SECONDS)
        host.call("checkpoint.delete", {"monitor": monitor, "checkpoints": ["all"]}, SECONDS)
        dirty = resident() - before
        began = time.monotonic()
        qmp.command("quit")
        daemon.process.wait(SECONDS)
        spent = time.monotonic() - began
    stored = image.stat().st_blocks * 512 - empty
    image.unlink()
    return untouched, dirty, spent, stored / MIB


def main():
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--repeats", type=int, default=7, help="calls of each method")
    options.add_argument("--rounds", type=int, default=7, help="rounds of each ratio")
    options = options.parse_args()
    with tempfile.TemporaryDirectory(prefix="fleece-bench-", dir="/dev/shm") as name:
        folder = pathlib.Path(name)
        report_methods(folder, options.repeats)
        print("writes with recording checkpoints, ratio to none, medians (least to most)")
        for block, writes in ((4096, 40_000), (65536, 15_000)):
            title = f"a storage daemon's disk, {block // 1024} KiB over NBD"
            ratios(title, lambda count: nbd_writes(folder, count, block, writes), options.rounds)
        with Guest([Disk(size=256 * MIB)]) as guest, plugin(folder) as host:
            monitor = f"unix:{guest.qmp[0]}"
            ratios("a guest (emulated), 4 KiB and fdatasync", lambda count: guest_writes(guest, host, monitor, count), options.rounds)
        print("QEMU's memory for checkpoints of a disk of 1 TiB")
        for count in (16, 64):
            untouched, dirty, spent, stored = memory(folder, count)
            print(f"  {count}: {untouched:.1f} MiB when made, {dirty:.0f} MiB when all is dirty;"
                  f" QEMU ends in {spent:.2f} s, and its image grows by {stored:.0f} MiB")


if __name__ == "__main__":
    main()
