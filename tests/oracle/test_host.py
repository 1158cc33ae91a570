"""The reference host on a real QEMU: two stores of one VM, through restarts and a crash."""

import os
import subprocess
import sys

from . import support
from .guest import ROOT
from .life import Life

HOST = str(ROOT / "integrations/python/qemu-fleece-host")
FULL = r"(?m)^dev-{} +full +{} "
INCREMENTAL = r"(?m)^dev-{} +incremental +- "


class Stores(Life):
    def setUp(self):
        super().setUp()
        self.stores = [str(self.places.folder / name) for name in ("one", "two")]
        self.uuid = ("-uuid", "2c4d9a52-7a0f-4c9c-9f4e-0d6f2a9f3d11")
        self.boot(*self.uuid)

    def host(self, command, *arguments):
        """What a command says that must succeed."""
        environment = dict(os.environ, QEMU_FLEECE=support.PLUGIN)
        done = subprocess.run(
            [sys.executable, HOST, command, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            timeout=support.SECONDS,
            env=environment,
        )
        self.assertEqual(0, done.returncode, done.stdout)
        return done.stdout

    def ask(self, command, *arguments):
        return self.host(command, "--qmp", self.rig.monitor, *arguments)

    def save(self, store, **expected):
        """A backup to a store, restored, against QEMU's own copy: each disk as expected."""
        estimate = self.ask("estimate", "--to", store)
        done = self.ask("backup", "--to", store)
        copies = self.rig.oracle()
        for node, pattern in expected.items():
            self.assertRegex(done, pattern)
            mode = next(line.split()[1:3] for line in done.splitlines() if line.startswith(f"dev-{node} "))
            self.assertRegex(estimate, rf"(?m)^dev-{node} +16.0 MiB +{mode[0]} +{mode[1]} ")
            image = self.places.folder / "restored"
            self.host("restore", store, "--disk", f"dev-{node}", "--output", str(image))
            self.assert_equal_files(image, copies[node], node)
            image.unlink()
        self.rig.forget()

    def test_two_stores_side_by_side_through_a_restart_and_a_crash(self):
        one, two = self.stores
        self.write("write -P 1 0 8M")
        for number in range(3):
            for store in (one, two):
                kind = INCREMENTAL if number else r"(?m)^dev-{} +full +no base "
                self.save(store, a=kind.format("a"), b=kind.format("b"))
                self.write(f"write -P {number + 2} {number * 2}M 128K", f"write -z {number + 4}M 64K")
        both = self.ask("checkpoints", "--all")
        self.assertEqual(4, both.count(" usable "), both)
        self.assertEqual(2, self.ask("checkpoints", "--to", one).count(" usable "))

        self.quit()
        self.boot(*self.uuid)
        self.change()
        self.save(one, a=INCREMENTAL.format("a"), b=FULL.format("b", "bitmap_lost"))
        self.change()

        self.kill()
        self.boot(*self.uuid)
        self.change()
        said = self.ask("repair", "--to", two)
        self.assertRegex(said, r"(?m)^dev-a: removed: qemu-fleece/")
        self.assertRegex(said, r"(?m)^dev-a: lost, .* \(inconsistent\)$")
        self.assertRegex(said, r"(?s)the next backup:.*\ndev-a +16.0 MiB +full +bitmap_lost ")
        self.assertIn("nothing had to be removed", self.ask("repair", "--all"))
        for store in (one, two):
            self.save(store, a=FULL.format("a", "bitmap_lost"), b=FULL.format("b", "bitmap_lost"))
        for store in (one, two):
            self.save(store, a=INCREMENTAL.format("a"), b=INCREMENTAL.format("b"))
            self.assertIn(", 0 problems", self.host("verify", store))

    def test_what_lies_on_a_backing_image_is_not_asked_to_be_deleted(self):
        (one, _), overlay = self.stores, self.places.folder / "o.img"
        only = ("--to", one, "--disk", "dev-a")
        self.ask("backup", *only)
        support.make_image(overlay, "qcow2", "16M")
        file = {"driver": "file", "filename": str(overlay)}
        node = {"driver": "qcow2", "node-name": "o", "backing": None, "file": file}
        self.rig.qmp.command("blockdev-add", node)
        action = {"type": "blockdev-snapshot", "data": {"node": "a", "overlay": "o"}}
        self.rig.qmp.command("transaction", {"actions": [action]})
        self.change()
        self.assertRegex(self.ask("estimate", *only), r"(?m)^dev-a .* full +on_backing_image ")
        for expected in (FULL.format("a", "on_backing_image"), INCREMENTAL.format("a")):
            done = self.ask("backup", *only)
            self.assertRegex(done, expected)
            self.assertNotIn("left behind", done)
