"""The export host against a real QEMU: each image of its chains held against QEMU's own copy."""

import fcntl
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT / "tests"))

from oracle import support  # noqa: E402
from oracle.guest import MIB  # noqa: E402
from oracle.support import Rig, Vm, io, make_image, virtio  # noqa: E402

HOST = ROOT / "integrations/nbdcopy/fleece-export"
CHAIN = "fleece-export"
SECONDS = 120
NODES = {"dev-a": "a", "dev-b": "b"}
# One that takes its time, and says so. Its rate is in bits a second.
SLOW = 'echo >"$MARK"; exec "$REAL" --filter=rate "$@" rate=2M'


class ExportHost(support.Test):
    limit = 120

    def setUp(self):
        self.places = support.Places()
        self.addCleanup(self.places.close)
        self.folder = self.places.folder
        # A store whose name needs quotes; a disk whose end is not that of a cluster.
        self.store = self.folder / "the store"
        make_image(self.folder / "a.qcow2", "qcow2", 32 * MIB)
        make_image(self.folder / "b.raw", "raw", 16 * MIB + 512)
        arguments = virtio("a", self.folder / "a.qcow2") + virtio("b", self.folder / "b.raw", "raw")
        self.rig = Rig(Vm(arguments))
        self.addCleanup(self.rig.close)
        (self.folder / "tmp").mkdir()
        self.environment = dict(
            os.environ,
            QEMU_FLEECE=support.PLUGIN,
            QEMU_FLEECE_SCRATCH_DIR=str(self.rig.scratch),
            QEMU_FLEECE_RUNTIME_DIR=str(self.rig.runtime),
            TMPDIR=str(self.folder / "tmp"),
        )
        self.write("write -P 1 0 3M", "write -P 2 12M 1M")

    def write(self, *commands):
        for disk in NODES:
            for command in commands:
                io(self.rig.qmp, f"/machine/peripheral/{disk}/virtio-backend", command)

    def start(self, *options, shell="sh", env=None):
        """The host, in a process group of its own as a terminal gives it one."""
        command = [shell, str(HOST), self.rig.monitor, str(self.store), *options]
        output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen(command, env=env or self.environment, **output, start_new_session=True)

    def wait(self, host):
        """The end of the host and all that it has started: what it said."""
        try:
            return host.communicate(timeout=SECONDS)[0]
        except BaseException:
            os.killpg(host.pid, signal.SIGKILL)
            host.communicate()
            raise

    def back_up(self, *options, status=0, **more):
        """What the host says."""
        host = self.start(*options, **more)
        said = self.wait(host)
        self.assertEqual(status, host.returncode, said)
        return said

    def program(self, name, script):
        """The environment of a host that finds this script as one of its programs."""
        folder = self.folder / "programs"
        folder.mkdir(exist_ok=True)
        (folder / name).write_text(f"#!/bin/bash\n{script}\n")
        (folder / name).chmod(0o755)
        mark = {"MARK": str(self.folder / "mark")}
        if name == "plugin":
            return {**self.environment, **mark, "QEMU_FLEECE": str(folder / name), "REAL": support.PLUGIN}
        path = f"{folder}:{os.environ['PATH']}"
        return {**self.environment, **mark, "PATH": path, "REAL": shutil.which(name)}

    def backups(self):
        return sorted(path.name for path in self.store.iterdir() if path.name != "lock")

    def image(self, disk, backup=-1):
        return self.store / self.backups()[backup] / f"{disk}.qcow2"

    def images_are_equal(self):
        copies = self.rig.oracle()
        for disk, node in NODES.items():
            subprocess.run(["qemu-img", "check", "-q", self.image(disk)], check=True)
            raw = self.folder / "seen.raw"
            subprocess.run(["qemu-img", "convert", "-O", "raw", self.image(disk), raw], check=True)
            self.assert_equal_files(raw, copies[node], disk)

    def own(self, disk):
        """The (offset, length) of what the newest image holds itself."""
        command = ["qemu-img", "map", "--output=json", str(self.image(disk))]
        found = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
        ranges = []
        for each in found:
            if each["depth"] > 0 or not each["present"]:
                continue
            start, length = each["start"], each["length"]
            if ranges and sum(ranges[-1]) == start:  # It goes on in another way.
                start, length = ranges[-1][0], ranges.pop()[1] + length
            ranges.append((start, length))
        return ranges

    def only_checkpoint(self, name):
        with self.rig.plugin() as plugin:
            expected = {disk: {name: "usable"} for disk in NODES}
            self.assertEqual(expected, self.rig.health(plugin, chain=CHAIN))

    def nothing_has_happened(self, before):
        """The store is as it was, the base survives, and the next backup is incremental and right."""
        self.assertEqual(before, self.backups())
        self.assertEqual([], support.ours(self.rig.qmp))
        self.assertEqual([], self.rig.files())
        self.assertEqual([], os.listdir(self.folder / "tmp"))
        self.only_checkpoint(before[-1])
        self.write("write -P 5 1M 64k")
        self.assertIn("dev-a: incremental\ndev-b: incremental\n", self.back_up())
        self.assertEqual(before, self.backups()[:-1])
        self.images_are_equal()

    def test_a_full_and_two_incrementals(self):
        for shell in ("sh", "bash"):
            self.assertIn("dev-a: full\ndev-b: full\n", self.back_up("--full", shell=shell))
            self.images_are_equal()
            for number in range(2):
                self.write(f"write -P {number + 10} {number}M 3M", "write -z 6M 1M", "write -P 9 16776704 512")
                self.assertIn("dev-a: incremental\ndev-b: incremental\n", self.back_up(shell=shell))
                self.images_are_equal()
        self.only_checkpoint(self.backups()[-1])
        self.assertEqual([], os.listdir(self.folder / "tmp"))
        # Zeros take no room.
        self.assertLess(self.image("dev-a", 0).stat().st_blocks * 512, 8 * MIB)

    def test_only_what_changed_is_copied(self):
        self.back_up()
        self.write(f"write -P 3 {5 * MIB + 512} 512", f"write -P 4 {8 * MIB} 128k", "write -P 0 1M 64k", "discard 12M 64k")
        self.back_up()
        self.images_are_equal()
        changed = [(MIB, 65536), (5 * MIB, 65536), (8 * MIB, 131072), (12 * MIB, 65536)]
        for disk in NODES:
            self.assertEqual(changed, self.own(disk), disk)
        self.back_up()
        self.images_are_equal()
        for disk in NODES:
            self.assertEqual([], self.own(disk), disk)

    def test_a_base_that_is_lost_or_another(self):
        self.back_up()
        name = self.backups()[0]
        with self.rig.plugin() as plugin:
            monitor = {"monitor": self.rig.monitor, "chain": CHAIN}
            plugin.call("checkpoint.delete", {**monitor, "checkpoints": [name]})
            # Of the same name, but of another point in time.
            plugin.call("checkpoint.create", {**monitor, "checkpoint": name, "disks": ["dev-a"]})
        said = self.back_up()
        self.assertRegex(said, "dev-a: full, because of base_mismatch\ndev-b: full, because of [a-z_]+\n")
        self.images_are_equal()
        self.assertEqual([], [each for each in self.own("dev-a") if each[1] > 4 * MIB])

    def test_a_commit_without_an_answer(self):
        self.back_up()
        mute = self.program("plugin", """exec "$REAL" > >(sed -u '/"committed"/Q')""")
        self.assertIn("backup.commit", self.back_up(env=mute, status=3))
        self.nothing_has_happened(self.backups())

    def test_a_map_without_its_end(self):
        """A part of a map is no map: what it does not name would be missing."""
        self.back_up()
        before = self.backups()
        self.write("write -P 3 0 4M", "write -P 4 8M 1M")
        for filter in (
            """sed -u '/"data_bytes"/Q'""",
            """sed -u 's/"result":{"extents".*/"error":{"message":"no","data":{}}}/'""",
        ):
            with self.subTest(filter):
                said = self.back_up(env=self.program("plugin", f'exec "$REAL" > >({filter})'), status=1)
                self.assertIn("backup.map", said)
                self.nothing_has_happened(before)
                before = self.backups()
                self.write("write -P 3 0 4M", "write -P 4 8M 1M")

    def test_programs_that_fail(self):
        self.back_up()
        before = self.backups()
        for name, script in (
            ("nbdcopy", "exit 1"),
            # After some of it.
            ("qemu-nbd", 'ulimit -f 1024; exec "$REAL" "$@"'),
            ("nbdkit", "exit 1"),
        ):
            with self.subTest(name):
                self.write("write -P 3 0 4M")
                self.assertIn("nbdcopy failed", self.back_up(env=self.program(name, script), status=1))
                (self.folder / "programs" / name).unlink()
                self.nothing_has_happened(before)
                before = self.backups()
        self.back_up(env=dict(self.environment, QEMU_FLEECE="/nowhere/plugin"), status=1)
        self.assertEqual(before, self.backups())

    def in_the_middle(self):
        """A host in the middle of an incremental's first disk."""
        before = self.backups()
        self.write("write -P 3 0 4M")
        slow = self.program("nbdkit", SLOW)
        os.mkfifo(slow["MARK"])
        host = self.start(env=slow)
        self.addCleanup(self.wait, host)
        with open(slow["MARK"], encoding="ascii") as mark:
            mark.read()
        os.unlink(slow["MARK"])
        self.assertEqual(len(before) + 1, len(self.backups()), "it is not in the middle")
        return host, before

    def test_interrupted(self):
        self.back_up()
        for number, status in ((signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)):
            for to_all in (True, False):
                with self.subTest(number, to_all=to_all):
                    host, before = self.in_the_middle()
                    (os.killpg if to_all else os.kill)(host.pid, number)
                    said = self.wait(host)
                    # The signal may reach the others first, and the host sees only their end.
                    self.assertIn(host.returncode, (status, 1) if to_all else (status,), said)
                    self.nothing_has_happened(before)

    def test_killed(self):
        self.back_up()
        host, before = self.in_the_middle()
        host.kill()
        self.wait(host)
        # Those that it has started have the lock until they have cleaned up.
        with open(self.store / "lock", "ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
        self.assertRegex(self.backups()[-1], "^000002-.*\\.partial$")
        shutil.rmtree(self.folder / "tmp")  # SIGKILL leaves it.
        (self.folder / "tmp").mkdir()
        # The next run removes the rest.
        os.rename(self.store / self.backups()[-1], self.folder / "partial")
        self.nothing_has_happened(before)

    def test_wrong_usage(self):
        for arguments in ([], ["a"], ["a", "b", "c"], ["a", "b", "--full", "d"]):
            command = ["sh", str(HOST), *arguments]
            said = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
            self.assertEqual(2, said.returncode)
            self.assertIn("usage", said.stderr)


if __name__ == "__main__":
    support.unittest.main()
