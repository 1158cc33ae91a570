"""The shell host against a real QEMU: each backup restored and held against QEMU's own copy."""

import fcntl
import os
import pathlib
import resource
import signal
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT / "tests"))

from oracle import support  # noqa: E402
from oracle.guest import MIB  # noqa: E402
from oracle.support import Rig, Vm, io, make_image, virtio  # noqa: E402

HOST = ROOT / "integrations/shell/fleece-pull"
CHAIN = "fleece-pull"
SECONDS = 120
NODES = {"dev-a": "a", "dev-b": "b"}
# A plugin that stops in the middle of a stream, and says so.
STALLING = 'dd bs=16k count=60 status=none; echo >"$MARK"; cat >/dev/null'
# One whose reply tells of another stream than the records.
LYING = """sed -u 's/"result":{"digest":"...../"result":{"digest":"wrong/'"""
# One that ends in the middle of a stream.
ENDING = "dd bs=16k count=60 status=none"


class ShellHost(support.Test):
    limit = 300  # jq is slow, on a busy machine more so

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
        self.environment = dict(
            os.environ,
            QEMU_FLEECE=support.PLUGIN,
            QEMU_FLEECE_SCRATCH_DIR=str(self.rig.scratch),
            QEMU_FLEECE_RUNTIME_DIR=str(self.rig.runtime),
            TMPDIR=str(self.folder),
        )
        self.write("write -P 1 0 3M", "write -P 2 12M 1M")

    def write(self, *commands):
        for disk in NODES:
            for command in commands:
                io(self.rig.qmp, f"/machine/peripheral/{disk}/virtio-backend", command)

    def start(self, *arguments, shell="sh", **more):
        """The host, in a process group of its own as a terminal gives it one."""
        command = [shell, str(HOST), *map(str, arguments)]
        output = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(command, **{"env": self.environment, **output, "start_new_session": True, **more})

    def run_host(self, *arguments, status=0, **more):
        """What the host says."""
        host = self.start(*arguments, **more)
        said, errors = self.wait(host)
        self.assertEqual(status, host.returncode, said + errors)
        return said + errors

    def wait(self, host):
        """The end of the host and all that it has started: what it said."""
        try:
            return host.communicate(timeout=SECONDS)
        except BaseException:
            os.killpg(host.pid, signal.SIGKILL)
            host.communicate()
            raise

    def back_up(self, *options, **more):
        return self.run_host("backup", self.rig.monitor, self.store, *options, **more)

    def restored_are_equal(self, suffix="raw", **more):
        copies = self.rig.oracle()
        for disk, node in NODES.items():
            image = self.folder / f"restored.{suffix}"
            self.run_host("restore", self.store, disk, image, **more)
            if suffix == "qcow2":
                raw = self.folder / "restored.raw"
                subprocess.run(["qemu-img", "convert", "-O", "raw", image, raw], check=True)
                image.unlink()
                image = raw
            self.assert_equal_files(image, copies[node], disk)
            image.unlink()

    def backups(self):
        return sorted(path.name for path in self.store.iterdir() if path.name != "lock")

    def only_checkpoint(self, name):
        with self.rig.plugin() as plugin:
            expected = {disk: {name: "usable"} for disk in NODES}
            self.assertEqual(expected, self.rig.health(plugin, chain=CHAIN))

    def with_plugin(self, filter):
        """The environment of a host whose plugin's output passes through this."""
        program = self.folder / "plugin"
        program.write_text(f'#!/bin/bash\nexec "$REAL" > >({filter})\n')
        program.chmod(0o755)
        mark = str(self.folder / "mark")
        return dict(self.environment, QEMU_FLEECE=str(program), REAL=support.PLUGIN, MARK=mark)

    def nothing_has_happened(self, before):
        """The store is as it was, the base survives, and the next backup is incremental and right."""
        self.assertEqual(before, self.backups())
        self.assertEqual([], support.ours(self.rig.qmp))
        self.assertEqual([], self.rig.files())
        self.only_checkpoint(before[-1])
        self.write("write -P 5 1M 64k")
        said = self.back_up()
        self.assertIn("dev-a: incremental\ndev-b: incremental\n", said)
        self.assertEqual(before, self.backups()[:-1])
        self.restored_are_equal()

    def test_a_full_and_two_incrementals(self):
        for shell in ("sh", "bash"):
            self.assertIn("dev-a: full\ndev-b: full\n", self.back_up("--full", shell=shell))
            self.restored_are_equal(shell=shell)
            for number in range(2):
                self.write(f"write -P {number + 10} {number}M 3M", "write -z 6M 1M", "write -P 9 16776704 512")
                self.assertIn("dev-a: incremental\ndev-b: incremental\n", self.back_up(shell=shell))
                self.restored_are_equal(shell=shell)
        self.restored_are_equal("qcow2")
        self.only_checkpoint(self.backups()[-1])
        middle = self.backups()[1]
        self.run_host("restore", self.store, "dev-a", self.folder / "middle", middle)
        self.run_host("restore", self.store, "dev-a", self.folder / "middle", middle, status=1)
        self.assertEqual([], list(self.folder.glob("tmp.*")))

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
        self.restored_are_equal()

    def test_a_commit_without_an_answer(self):
        self.back_up()
        said = self.back_up(env=self.with_plugin("""sed -u '/"committed"/Q'"""), status=3)
        self.assertIn("backup.commit", said)
        self.nothing_has_happened(self.backups())

    def in_the_middle(self):
        """A host in the middle of an incremental."""
        self.back_up()
        before = self.backups()
        self.write("write -P 3 0 4M")
        environment = self.with_plugin(STALLING)
        os.mkfifo(environment["MARK"])
        host = self.start("backup", self.rig.monitor, self.store, env=environment)
        self.addCleanup(self.wait, host)
        with open(environment["MARK"], encoding="ascii") as mark:
            mark.read()
        self.assertEqual(len(before) + 1, len(self.backups()), "it is not in the middle")
        return host, before

    def test_interrupted(self):
        for number, status in ((signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)):
            with self.subTest(number):
                host, before = self.in_the_middle()
                os.killpg(host.pid, number)
                said, errors = self.wait(host)
                # The signal may reach the plugin first, and the host sees only its end.
                self.assertIn(host.returncode, (status, 1), said + errors)
                self.nothing_has_happened(before)
                os.unlink(self.folder / "mark")

    def test_killed(self):
        host, before = self.in_the_middle()
        host.kill()
        self.wait(host)
        # The plugin has the lock until it has cleaned up.
        with open(self.store / "lock", "ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
        self.run_host("restore", self.store, "dev-a", self.folder / "image")
        partial = self.backups()[-1]
        self.assertRegex(partial, "^000002-.*\\.partial$")
        self.run_host("restore", self.store, "dev-a", self.folder / "other", partial, status=1)
        self.assertFalse((self.folder / "other").exists())
        # The next run removes it.
        os.rename(self.store / partial, self.folder / partial)
        self.nothing_has_happened(before)

    def test_a_plugin_that_fails(self):
        for filter in (LYING, ENDING):
            with self.subTest(filter):
                self.back_up()
                before = self.backups()
                self.write("write -P 3 0 4M")
                self.back_up(env=self.with_plugin(filter), status=1)
                self.nothing_has_happened(before)
        with self.subTest("no plugin"):
            self.back_up(env=dict(self.environment, QEMU_FLEECE="/nowhere/plugin"), status=1)

    def test_a_full_store(self):
        self.back_up()
        before = self.backups()
        self.write("write -P 3 0 4M")

        def limit():
            resource.setrlimit(resource.RLIMIT_FSIZE, (2 * MIB, 2 * MIB))

        # Python ignores SIGXFSZ, and so does then the host: writes fail as on a full disk.
        self.back_up(preexec_fn=limit, restore_signals=False, status=1)
        self.nothing_has_happened(before)

    def test_a_damaged_stream(self):
        self.back_up()
        stream = self.store / self.backups()[0] / "dev-a.stream"
        whole = stream.read_bytes()
        target = self.folder / "image"
        for damaged in (whole[:5000] + b"?" + whole[5001:], whole[: len(whole) // 2], whole[:-10], b""):
            stream.write_bytes(damaged)
            self.run_host("restore", self.store, "dev-a", target, status=1)
            self.assertFalse(target.exists())
        stream.write_bytes(whole)
        self.run_host("restore", self.store, "dev-a", target)

    def test_wrong_usage(self):
        for arguments in ([], ["backup"], ["backup", "a", "b", "c"], ["restore", "a", "b"], ["die", "a"]):
            self.assertIn("usage", self.run_host(*arguments, status=2))


if __name__ == "__main__":
    support.unittest.main()
