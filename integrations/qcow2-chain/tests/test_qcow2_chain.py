"""Chains of qcow2 files of a real QEMU: qemu-img reads each, and it is QEMU's own copy."""

import json
import os
import pathlib
import select
import signal
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT / "tests"))

from oracle import support  # noqa: E402
from oracle.guest import MIB  # noqa: E402
from oracle.support import Rig, Vm, io, make_image, virtio  # noqa: E402

HOST = ROOT / "integrations/qcow2-chain/fleece-qcow2"
CHAIN = "qcow2-chain"
NODES = {"dev-a": "a", "dev-b": "b"}
SECONDS = 120
# A push of a few MiB takes minutes.
SLOW = ["--speed", "65536"]


class Qcow2Chain(support.Test):
    def setUp(self):
        self.places = support.Places()
        self.addCleanup(self.places.close)
        self.folder = self.places.folder / "chain"
        make_image(self.places.folder / "a.qcow2", "qcow2", 32 * MIB)
        # Its end is not that of a cluster.
        make_image(self.places.folder / "b.raw", "raw", 16 * MIB + 512)
        arguments = virtio("a", self.places.folder / "a.qcow2")
        self.rig = Rig(Vm([*arguments, *virtio("b", self.places.folder / "b.raw", "raw")]))
        self.addCleanup(self.rig.close)
        self.environment = dict(
            os.environ,
            QEMU_FLEECE=support.PLUGIN,
            QEMU_FLEECE_SCRATCH_DIR=str(self.rig.scratch),
            QEMU_FLEECE_RUNTIME_DIR=str(self.rig.runtime),
        )
        self.write("write -P 1 0 3M", "write -P 2 12M 1M")

    def write(self, *commands):
        for disk in NODES:
            for command in commands:
                io(self.rig.qmp, f"/machine/peripheral/{disk}/virtio-backend", command)

    def start(self, *options, **more):
        command = ["/usr/bin/python3", str(HOST), self.rig.monitor, str(self.folder), *options]
        output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        host = subprocess.Popen(command, **{"env": self.environment, **output, **more})
        self.addCleanup(self.end, host)
        return host

    @staticmethod
    def end(host):
        host.kill()
        host.communicate()

    def plugin(self, script):
        """The environment of a host whose plugin is this script around the real one."""
        program = self.places.folder / "plugin"
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
        return dict(self.environment, QEMU_FLEECE=str(program), REAL=support.PLUGIN)

    def back_up(self, *options, status=0, **more):
        """What the host says."""
        host = self.start(*options, **more)
        said, _ = host.communicate(timeout=SECONDS)
        self.assertEqual(status, host.returncode, said)
        return said

    def backups(self):
        return sorted(path.name for path in self.folder.iterdir() if path.name != "lock")

    def newest_is_equal(self):
        """The newest files are what QEMU has copied itself at that point in time."""
        self.equal(self.backups()[-1], self.rig.oracle())

    def equal(self, name, copies):
        for disk, node in NODES.items():
            image = self.folder / name / f"{disk}.qcow2"
            subprocess.run(["qemu-img", "check", "-q", image], check=True)
            raw = self.places.folder / "converted.raw"
            subprocess.run(["qemu-img", "convert", "-O", "raw", image, raw], check=True)
            self.assert_equal_files(raw, copies[node], f"{name}/{disk}")

    def chain(self, name, disk):
        """The files that make an image, the newest first, as their headers name them."""
        image = self.folder / name / f"{disk}.qcow2"
        info = ["qemu-img", "info", "--backing-chain", "--output=json", image]
        return [link.get("backing-filename") for link in json.loads(subprocess.check_output(info))]

    def nothing_has_happened(self, before):
        """The folder is as it was, the base survives, and the next backup is incremental and right."""
        self.assertEqual(before, self.backups())
        self.assertEqual([], support.ours(self.rig.qmp))
        self.assertEqual([], self.rig.files())
        with self.rig.plugin() as plugin:
            expected = {disk: {before[-1]: "usable"} for disk in NODES}
            self.assertEqual(expected, self.rig.health(plugin, chain=CHAIN))
        self.write("write -P 5 1M 64k")
        said = self.back_up()
        for disk in NODES:
            self.assertIn(f"{disk}: incremental, on {before[-1]}\n", said)
        self.newest_is_equal()

    def test_a_full_two_incrementals_and_a_new_chain(self):
        copies = []
        for number in range(4):
            said = self.back_up(*(["--full"] if number == 3 else ["--compress"] if number == 2 else []))
            self.assertIn("dev-a: incremental, on" if number in (1, 2) else "dev-a: full\n", said)
            self.newest_is_equal()
            copies.append(self.rig.oracle())
            # Zeros over data of the full, and a bit of the last, short cluster.
            self.write(f"write -P {number + 10} {number}M 1M", f"write -z {2 + number}M 512k")
            self.write(f"write -P {number + 20} 16777216 512")
        names = self.backups()
        # Each one stays what it was, and the whole folder can be moved.
        self.folder = self.folder.rename(self.places.folder / "moved")
        for name, copy in zip(names, copies):
            self.equal(name, copy)
        for disk in NODES:
            files = [f"../{names[1]}/{disk}.qcow2", f"../{names[0]}/{disk}.qcow2", None]
            self.assertEqual(files, self.chain(names[2], disk))
            self.assertEqual([None], self.chain(names[3], disk))
        with self.rig.plugin() as plugin:
            # Older checkpoints are gone.
            self.assertEqual({disk: {names[3]: "usable"} for disk in NODES}, self.rig.health(plugin, chain=CHAIN))

    def test_a_base_that_is_lost_or_another(self):
        self.back_up()
        name = self.backups()[0]
        with self.rig.plugin() as plugin:
            monitor = {"monitor": self.rig.monitor, "chain": CHAIN}
            plugin.call("checkpoint.delete", {**monitor, "checkpoints": [name]})
            # Of the same name, but of another point in time.
            plugin.call("checkpoint.create", {**monitor, "checkpoint": name, "disks": ["dev-a"]})
        said = self.back_up()
        self.assertIn("dev-a: full, because of base_mismatch\n", said)
        self.assertRegex(said, "dev-b: full, because of [a-z_]+\n")
        self.newest_is_equal()
        self.assertEqual([None], self.chain(self.backups()[1], "dev-b"))

    def test_a_commit_that_gets_lost(self):
        """The base is the newest backup whose checkpoint the VM has: not the newest one."""
        self.back_up()
        before = self.backups()
        self.write("write -P 3 0 1M")
        deaf = self.plugin("""sed -u '/"backup.commit"/Q' | "$REAL" """)
        self.assertIn("is stored", self.back_up(status=3, env=deaf))
        self.newest_is_equal()
        self.assertEqual(2, len(self.backups()))
        self.write("write -P 4 2M 1M")
        self.assertIn(f"dev-a: incremental, on {before[0]}\n", self.back_up())
        self.newest_is_equal()

    def in_the_middle(self, **more):
        """A host in the middle of an incremental, and the backups before it."""
        self.back_up()
        before = self.backups()
        self.write("write -P 3 0 4M")
        host = self.start(*SLOW, **more)
        for _ in NODES:
            self.assertIn("incremental", host.stdout.readline())
        self.assertEqual(len(before) + 1, len(self.backups()))
        return host, before

    def test_interrupted(self):
        for number, status in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
            with self.subTest(number):
                host, before = self.in_the_middle()
                host.send_signal(number)
                host.communicate(timeout=SECONDS)
                self.assertEqual(status, host.returncode)
                self.nothing_has_happened(before)

    def test_killed(self):
        # A plugin that tells its number, for whose end can be waited.
        telling = self.plugin('echo $$ >"$0.pid"; exec "$REAL"')
        host, before = self.in_the_middle(env=telling)
        with os.fdopen(os.pidfd_open(int((self.places.folder / "plugin.pid").read_text()))) as plugin:
            host.kill()
            host.communicate(timeout=SECONDS)
            self.assertTrue(select.select([plugin], [], [], SECONDS)[0], "the plugin outlives its host")
        partial = self.backups()[1]
        self.assertRegex(partial, r"\.partial$")
        self.assertEqual([], list((self.folder / partial).iterdir()))
        # The next run removes it; here it would be in the comparison's way.
        (self.folder / partial).rename(self.places.folder / partial)
        self.nothing_has_happened(before)

    def test_a_full_disk(self):
        self.folder.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", "size=12M", "tmpfs", str(self.folder)]
        subprocess.run(mount, check=True)
        self.addCleanup(subprocess.run, ["umount", "-l", str(self.folder)], check=True)
        self.back_up()
        before = self.backups()
        self.write("write -P 3 0 4M")
        self.assertIn("target_unwritable", self.back_up(status=1))
        subprocess.run(["mount", "-o", "remount,size=64M", str(self.folder)], check=True)
        self.nothing_has_happened(before)


if __name__ == "__main__":
    support.unittest.main()
