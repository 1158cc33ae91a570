"""A guest with two busy disks: a full backup, two incrementals, three restores, all compared.

The second view of each instant is QEMU's own copy (tests/oracle/proxy.py), which shares
nothing with the plugin but the transaction that makes the instant.
"""

import contextlib
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "integrations/python")]

from fleece_host import backup, report, restore  # noqa: E402
from fleece_host.plugin import Plugin  # noqa: E402
from fleece_host.store import Store  # noqa: E402
from oracle.guest import MIB, Disk, Guest  # noqa: E402
from oracle.proxy import Proxy  # noqa: E402

DISKS = [Disk(size=768 * MIB), Disk(size=512 * MIB, format="raw")]
FORMATS = ["qcow2", "raw"]
BLOCK = 4 * MIB
HEAD = ["backup", "disk", "kind", "bytes read", "bytes stored", "scratch peak", "seconds", "equal"]


def main():
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with contextlib.ExitStack() as stack:
        folder = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fleece-demo-")))
        for name in ("oracle", "scratch", "restored"):
            (folder / name).mkdir()
        say("boots a guest (no KVM needed)")
        guest = stack.enter_context(Guest(DISKS))
        proxy = stack.enter_context(
            Proxy(str(folder / "monitor"), guest.qmp[0], guest.qmp[1], folder / "oracle"))
        start_writers(guest)
        store = Store(str(folder / "store"))
        rows = [row for number in (1, 2, 3) for row in round_(number, guest, proxy, store, folder)]
        for number in range(len(DISKS)):
            numbers = guest.stat(f"stop w{number}")
            say(f"disk{number}: the guest made {numbers['writes']} writes, {numbers['discards']} discards meanwhile")
        guest.poweroff()
    print(report.table(HEAD, rows))
    equal = all(row[-1] == "yes" for row in rows)
    say("all equal, byte for byte" if equal else "THEY DIFFER")
    return 0 if equal else 1


def say(text):
    print(f"-- {text}", flush=True)


def start_writers(guest):
    """An ext4 file system on each disk, some old files, and a writer that never rests."""
    for number in range(len(DISKS)):
        guest.run(f"mkfs disk{number}")
        guest.run(f"mount disk{number} /mnt{number}")
        guest.run(f"write /mnt{number}/old 0 64M {number + 1}")
        guest.run(f"write /mnt{number}/busy 0 48M {number + 5}")
        guest.run(f"start w{number} /mnt{number}/busy zero=10 discard=10 seed={number + 9}")
    say("two disks (qcow2 and raw) with ext4; a writer with fdatasync on each")


def change(guest, number):
    """What a day brings: new files, old ones deleted, their blocks given back."""
    for disk in range(len(DISKS)):
        guest.run(f"write /mnt{disk}/new{number} 0 16M {number}")
        if number == 3:
            guest.run(f"sh rm /mnt{disk}/old")
            guest.run(f"sh fstrim /mnt{disk}")


def round_(number, guest, proxy, store, folder):
    """One backup, its restore, and the comparison; the table's rows."""
    if number > 1:
        change(guest, number)
    kind = "full backup" if number == 1 else "incremental backup"
    say(f"{kind} {number}, the guest writes on")
    manifest = back_up(proxy, store, folder / "scratch")
    for disk, error in proxy.wait(number)["errors"].items():
        raise SystemExit(f"QEMU could not copy {disk}: {error}")
    rows = []
    for index, disk in enumerate(manifest["disks"]):
        target = folder / f"restored/{number}-{disk['disk']}"
        with plugin(folder / "scratch") as running:
            restore.run(running, store, disk["disk"], manifest["name"], str(target), FORMATS[index])
        equal = same(target, FORMATS[index], folder / f"oracle/{number}/disk{index}.raw")
        target.unlink()
        rows.append([str(number), disk["disk"], disk["mode"], report.size(disk["read_bytes"]),
                     report.size(disk["stored_bytes"]), report.size(disk["scratch_peak"]),
                     f"{disk['seconds']:.1f}", "yes" if equal else "NO"])
    say(f"restored both disks of {number} and compared them")
    return rows


def plugin(scratch, on_notice=None):
    command = [os.environ["QEMU_FLEECE"], "--scratch-dir", str(scratch), "--runtime-dir", str(scratch)]
    return Plugin(command, on_notice=on_notice)


def back_up(proxy, store, scratch):
    progress = report.Progress()
    with store.locked(), plugin(scratch, progress.notice) as running:
        try:
            return backup.run(running, store, backup.Options(proxy.listen), progress)
        finally:
            progress.clear()


def same(image, image_format, truth):
    """Whether an image holds exactly the bytes of a raw file."""
    raw = image
    if image_format != "raw":
        raw = image.with_suffix(".raw")
        subprocess.run(["qemu-img", "convert", "-f", image_format, "-O", "raw", image, raw], check=True)
    try:
        with open(raw, "rb") as one, open(truth, "rb") as other:
            while True:
                ours, theirs = one.read(BLOCK), other.read(BLOCK)
                if ours != theirs:
                    return False
                if not ours:
                    return True
    finally:
        if raw != image:
            raw.unlink()


if __name__ == "__main__":
    sys.exit(main())
