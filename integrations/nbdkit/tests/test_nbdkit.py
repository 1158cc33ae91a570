"""Encrypted images through nbdkit: QEMU's own LUKS reads them, and they are QEMU's own copies."""

import os
import pathlib
import select
import shutil
import signal
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT / "tests"))

from oracle import support  # noqa: E402
from oracle.guest import MIB  # noqa: E402
from oracle.support import Rig, Vm, io, make_image, virtio  # noqa: E402

HOST = ROOT / "integrations/nbdkit/fleece-luks"
NODES = {"dev-a": "a", "dev-b": "b"}
SECONDS = 120
# A push of a few MiB takes minutes.
SLOW = ["--speed", "65536"]


class NbdkitLuks(support.Test):
    def setUp(self):
        self.places = support.Places()
        self.addCleanup(self.places.close)
        self.folder = self.places.folder / "images"
        self.key = self.places.folder / "key"
        self.key.write_text("Oosh6ahthie7aiQuai0e")
        make_image(self.places.folder / "a.qcow2", "qcow2", 16 * MIB)
        # Its end is not that of a cluster.
        make_image(self.places.folder / "b.raw", "raw", 15 * MIB + 512)
        arguments = virtio("a", self.places.folder / "a.qcow2")
        self.rig = Rig(Vm([*arguments, *virtio("b", self.places.folder / "b.raw", "raw")]))
        self.addCleanup(self.rig.close)
        self.environment = dict(
            os.environ,
            QEMU_FLEECE=support.PLUGIN,
            QEMU_FLEECE_SCRATCH_DIR=str(self.rig.scratch),
            QEMU_FLEECE_RUNTIME_DIR=str(self.rig.runtime),
            TMPDIR=str(self.rig.runtime),
        )
        self.write("write -P 1 0 3M", "write -P 2 12M 1M")

    def write(self, *commands):
        for disk in NODES:
            for command in commands:
                io(self.rig.qmp, f"/machine/peripheral/{disk}/virtio-backend", command)

    def start(self, *options, **more):
        command = ["/usr/bin/python3", str(HOST), self.rig.monitor, str(self.folder), str(self.key), *options]
        output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        host = subprocess.Popen(command, **{"env": self.environment, **output, **more})
        self.addCleanup(self.end, host)
        return host

    @staticmethod
    def end(host):
        host.kill()
        host.communicate()

    def back_up(self, *options, status=0, **more):
        """What the host says."""
        host = self.start(*options, **more)
        said, _ = host.communicate(timeout=SECONDS)
        self.assertEqual(status, host.returncode, said)
        return said

    def program(self, name, script):
        """The environment of a host that finds this script as one of its programs."""
        folder = self.places.folder / "programs"
        folder.mkdir(exist_ok=True)
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o755)
        path = {"PATH": f"{folder}:{os.environ['PATH']}"} if name == "nbdkit" else {"QEMU_FLEECE": str(folder / name)}
        return {**self.environment, **path, "REAL": support.PLUGIN}

    def images_are_equal(self):
        """The images, decrypted by QEMU, are what QEMU has copied itself at that point in time."""
        self.assertEqual(["backup", "lock"], sorted(os.listdir(self.folder)))
        copies = self.rig.oracle()
        for disk, node in NODES.items():
            image = self.folder / "backup" / f"{disk}.luks"
            raw = self.places.folder / "decrypted.raw"
            source = f"driver=luks,key-secret=key,file.driver=file,file.filename={image}"
            secret = ["--object", f"secret,id=key,file={self.key}"]
            subprocess.run(["qemu-img", "convert", *secret, "--image-opts", source, "-O", "raw", raw], check=True)
            self.assert_equal_files(raw, copies[node], disk)

    def only_new_checkpoints(self):
        """Each disk has one checkpoint."""
        with self.rig.plugin() as plugin:
            health = self.rig.health(plugin, all_chains=True)
        self.assertEqual({disk: ["usable"] for disk in NODES}, {disk: list(h.values()) for disk, h in health.items()})

    def nothing_is_whole(self):
        """There is nothing that looks like a backup, and nothing in QEMU but the base."""
        self.assertEqual(["backup.partial", "lock"], sorted(os.listdir(self.folder)))
        self.assertEqual([], support.ours(self.rig.qmp))
        self.assertEqual([], self.rig.files())
        self.only_new_checkpoints()

    def next_is_right(self, mode="incremental"):
        self.write("write -P 5 1M 64k")
        said = self.back_up()
        self.assertEqual([f"{disk}: {mode}" for disk in NODES], [line.split(",")[0] for line in said.splitlines()])
        self.images_are_equal()
        self.only_new_checkpoints()

    def test_a_full_and_incrementals_over_it(self):
        self.assertEqual("dev-a: full\ndev-b: full\n", self.back_up())
        self.images_are_equal()
        # Nothing of the guest's can be read in there.
        for disk in NODES:
            stored = (self.folder / "backup" / f"{disk}.luks").read_bytes()
            for byte in (1, 2):
                self.assertNotIn(bytes([byte]) * 512, stored)
        for number in range(2):
            self.write(f"write -P {number + 10} {number}M 1M", f"write -z {2 + number}M 512k")
            self.write(f"write -P {number + 15} {15 * MIB} 512")
            self.assertEqual("dev-a: incremental\ndev-b: incremental\n", self.back_up())
            self.images_are_equal()
        self.only_new_checkpoints()

    def test_two_folders(self):
        self.back_up()
        first, self.folder = self.folder, self.places.folder / "other"
        self.back_up()
        self.folder = first
        self.write("write -P 3 0 1M")
        self.assertEqual("dev-a: incremental\ndev-b: incremental\n", self.back_up())
        self.images_are_equal()

    def test_a_base_that_is_lost_or_another(self):
        self.back_up()
        with self.rig.plugin() as plugin:
            listed = plugin.call("checkpoint.list", {"monitor": self.rig.monitor, "all_chains": True})
            known = listed["disks"][0]["checkpoints"][0]
            monitor = {"monitor": self.rig.monitor, "chain": known["chain"]}
            plugin.call("checkpoint.delete", {**monitor, "checkpoints": [known["checkpoint"]]})
            # Of the same name, but of another point in time.
            plugin.call("checkpoint.create", {**monitor, "checkpoint": known["checkpoint"], "disks": ["dev-a"]})
        said = self.back_up()
        self.assertRegex(said, "dev-a: full, because of base_mismatch\ndev-b: full, because of [a-z_]+\n")
        self.images_are_equal()
        self.only_new_checkpoints()

    def test_a_commit_that_gets_lost(self):
        self.back_up()
        self.write("write -P 3 0 1M")
        deaf = self.program("plugin", """sed -u '/"backup.commit"/Q' | "$REAL" """)
        self.assertIn("is stored", self.back_up(status=3, env=deaf))
        self.images_are_equal()
        self.next_is_right("full")

    def test_a_target_that_fails(self):
        """nbdkit may write the first 8 MiB of a file: then it gets an error, or dies of it."""
        self.back_up()
        # A server that dies has been reached by both disks, or by one.
        for trap, codes in ("trap '' XFSZ;", "target_unwritable"), ("", "target_(failed|unreachable)"):
            with self.subTest(codes):
                self.write("write -P 3 0 4M", "write -P 4 12M 1M")
                limited = f'{trap} ulimit -f 16384; exec {shutil.which("nbdkit")} "$@"'
                said = self.back_up(status=1, env=self.program("nbdkit", limited))
                self.assertRegex(said, rf"\[code {codes},")
                self.nothing_is_whole()
                self.next_is_right()

    def in_the_middle(self, *options, **more):
        """A host in the middle of writing."""
        self.write("write -P 3 0 4M", "write -z 12M 512k")
        host = self.start(*SLOW, *options, **more)
        for _ in NODES:
            self.assertIn("full" if options else "incremental", host.stdout.readline())
        return host

    def test_interrupted(self):
        self.back_up()
        for number, status in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
            with self.subTest(number):
                host = self.in_the_middle()
                host.send_signal(number)
                host.communicate(timeout=SECONDS)
                self.assertEqual(status, host.returncode)
                self.nothing_is_whole()
                self.next_is_right()

    def test_killed(self):
        # A plugin that tells its number, for whose end can be waited.
        telling = self.program("plugin", 'echo $$ >"$0.pid"; exec "$REAL"')
        self.back_up()
        # After a new image that failed, there is nothing to build on.
        for options, mode in ([], "incremental"), (["--full"], "full"):
            with self.subTest(mode):
                host = self.in_the_middle(*options, env=telling)
                number = int((self.places.folder / "programs/plugin.pid").read_text())
                with os.fdopen(os.pidfd_open(number)) as plugin:
                    host.kill()
                    host.communicate(timeout=SECONDS)
                    self.assertTrue(select.select([plugin], [], [], SECONDS)[0], "the plugin outlives its host")
                self.nothing_is_whole()
                self.next_is_right(mode)

    def test_a_key_with_a_lines_end(self):
        self.key.write_text("key\n")
        self.assertIn("line's end", self.back_up(status=1))
        self.assertFalse(self.folder.exists())


if __name__ == "__main__":
    support.unittest.main()
