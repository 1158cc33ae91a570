"""Pull, push and export side by side: how fast, and what the guest notices. See README.md beside this file."""

import argparse
import contextlib
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "tests"))
import bench  # noqa: E402
from oracle.guest import MIB, Disk, Guest  # noqa: E402
from oracle.machines import Vm, virtio  # noqa: E402
from oracle.targets import Server  # noqa: E402

ANSWER = b'"id":9,"result"'
# Of the slow host, and of each write of the slow target.
PAUSE = 0.3


class Plugin(bench.Plugin):
    """With calls whose notifications nobody wants."""

    def call(self, method, **params):
        self.ask(9, method, **params)
        while "id" not in (answer := self.line()):
            pass
        return answer["result"]


class Bench:
    """A point in time of the only disk of a VM, consumed and aborted again and again."""

    def __init__(self, folder, monitor, image, size):
        self.folder, self.size = folder, size
        (folder / "qmp.sock").unlink(missing_ok=True)
        (folder / "qmp.sock").symlink_to(monitor)
        self.image = image

    def take(self, way):
        """The seconds that a way takes."""
        with Plugin(self.folder) as plugin:
            began = plugin.begin()
            backup, disk = began["backup"], began["disks"][0]["disk"]
            seconds = getattr(self, way)(plugin, backup=backup, disk=disk)
            plugin.call("backup.abort", backup=backup)
        return seconds

    def pull(self, plugin, backup, disk):
        return plugin.drain(backup, [disk])

    def pull_slow(self, plugin, backup, disk):
        began = time.monotonic()
        plugin.ask(9, "backup.read", backup=backup, disk=disk)
        drop(plugin.output)
        return time.monotonic() - began

    def push(self, plugin, target, **params):
        began = time.monotonic()
        plugin.call("backup.push", target=target, **params)
        return time.monotonic() - began

    def push_file(self, plugin, format, **params):
        path = self.folder / f"target.{format}"
        seconds = self.push(plugin, {"kind": "file", "path": str(path), "format": format}, **params)
        path.unlink()
        return seconds

    def push_qcow2(self, plugin, **params):
        return self.push_file(plugin, "qcow2", **params)

    def push_raw(self, plugin, **params):
        return self.push_file(plugin, "raw", **params)

    def push_nbd(self, plugin, filters=(), **params):
        path, target = self.folder / "nbd.sock", self.folder / "target"
        target.touch()
        os.truncate(target, self.size)
        with contextlib.closing(Server(["nbdkit", "-f", *filters[:1], "file", target, *filters[1:]], path)) as server:
            seconds = self.push(plugin, server.target(is_zero=True), **params)
        path.unlink()
        target.unlink()
        return seconds

    def push_slow(self, plugin, **params):
        return self.push_nbd(plugin, ["--filter=delay", f"delay-write={int(PAUSE * 1000)}ms"], **params)

    def push_records(self, plugin, backup, disk):
        began = time.monotonic()
        plugin.ask(9, "backup.push", backup=backup, disk=disk, target={"kind": "records"})
        drop(plugin.output, pause=0)
        return time.monotonic() - began

    def export(self, plugin, pause=0, **params):
        uri = plugin.call("backup.export", **params)["uri"]
        began = time.monotonic()
        with subprocess.Popen(["nbdcopy", uri, "-"], stdout=subprocess.PIPE) as copy:
            drop(copy.stdout.fileno(), pause)
        return time.monotonic() - began

    def export_slow(self, plugin, **params):
        return self.export(plugin, PAUSE, **params)


def drop(source, pause=PAUSE):
    """Reads until the end or the answer, and drops the bytes; waits after each MiB."""
    buffer, read, tail = bytearray(MIB), 0, b""
    while length := os.readv(source, [buffer]):
        tail = (tail + buffer[max(0, length - 8192):length])[-8192:]
        if ANSWER in tail:
            return
        read += length
        if pause and read >= MIB:
            read = 0
            time.sleep(pause)


def middle(values, form):
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def throughput(folder, mib, rounds):
    """Of a disk without a hole, in memory, while nobody writes."""
    ways = ["pull", "push_qcow2", "push_raw", "push_nbd", "push_records", "export"]
    image = folder / "disk"
    with open("/dev/urandom", "rb") as random, open(image, "wb") as file:
        block = random.read(64 * MIB)
        for number in range(mib // 64):
            file.write(number.to_bytes(8, "big") + block[8:])
    times = {way: [] for way in ways}
    with Vm(virtio("disk0", image, "raw")) as vm:
        one = Bench(folder, vm.qmp[0], image, mib * MIB)
        for _ in range(rounds):
            for way in ways:
                times[way].append(one.take(way))
    image.unlink()
    print(f"{mib} MiB of data in memory, {rounds} rounds, medians (least to most)")
    for way in ways:
        rates = [mib / seconds for seconds in times[way]]
        ratios = [pull / seconds for pull, seconds in zip(times["pull"], times[way])]
        print(f"  {way:12}  {middle(rates, '.0f')} MiB/s  ratio {middle(ratios, '.2f')}")


def latency(folder, mib, rounds, seconds):
    """Of a guest that writes and syncs."""
    ways = ["pull", "push_qcow2", "push_raw", "push_nbd", "push_records", "export",
            "pull_slow", "push_slow", "export_slow"]
    rates, worst = ({way: [] for way in ways} for _ in range(2))
    quiet_worst, last = [], None

    def measure():
        """Writes a second, and the longest in ms, since the last time."""
        nonlocal last
        before, last = last, (time.monotonic(), guest.stat("stat w0"))
        return (last[1]["writes"] - before[1]["writes"]) / (last[0] - before[0]), last[1]["worst_us"] / 1000

    with Guest([Disk(size=(mib + 8) * MIB, iothread=True)]) as guest:
        one = Bench(folder, guest.qmp[0], guest.images[0], (mib + 8) * MIB)
        guest.run(f"write disk0 0 {mib}M 1")
        guest.run("start w0 disk0 pause_ms=5")
        last = (time.monotonic(), guest.stat("stat w0"))
        for _ in range(rounds):
            for way in ways:
                measure()
                guest.run(f"sh sleep {seconds}")
                quiet_rate, quiet = measure()
                quiet_worst.append(quiet)
                until = time.monotonic() + seconds
                while time.monotonic() < until:
                    one.take(way)
                rate, long = measure()
                rates[way].append(rate / quiet_rate)
                worst[way].append(long)
    print(f"guest that writes 4 to 64 KiB and syncs, {rounds} rounds, {mib} MiB of data")
    print(f"  {'no backup':12}  worst write {middle(quiet_worst, '.0f')} ms")
    for way in ways:
        print(f"  {way:12}  worst write {middle(worst[way], '.0f')} ms"
              f"  writes a second, ratio to none {middle(rates[way], '.2f')}")


def main():
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--mib", type=int, default=1024, help="of the disk whose throughput is measured")
    options.add_argument("--rounds", type=int, default=5)
    options = options.parse_args()
    with tempfile.TemporaryDirectory(prefix="fleece-bench-", dir="/dev/shm") as folder:
        throughput(pathlib.Path(folder), options.mib, options.rounds)
        latency(pathlib.Path(folder), 24, options.rounds, 3)


if __name__ == "__main__":
    main()
