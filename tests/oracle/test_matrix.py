"""Full and three incrementals of every kind of disk at once, under a guest that never rests.

The oracle is QEMU's own copy of the same instant (proxy.py), whole devices compared.
"""

import unittest

from .guest import MIB, Disk, Guest
from .kit import OLD, SECONDS, Case, Pull
from .proxy import Proxy
from .qmp import Qmp

KINDS = [dict(format="raw"), dict(cluster_size=65536), dict(cluster_size=2 * MIB)]


class Matrix(Case):
    def disks(self, iothread=False):
        return [Disk(size=48 * MIB, iothread=iothread, **kind) for kind in KINDS]

    def test_main_loop(self):
        self.rounds(Guest(self.disks()), "framed")

    def test_iothreads(self):
        self.rounds(Guest(self.disks(iothread=True)), "framed")

    def test_qemu_7_2(self):
        self.rounds(Guest(self.disks(), qemu=OLD), "inline")

    def rounds(self, guest, carrier):
        images = [bytearray() for _ in KINDS]
        oracle = self.folder / "oracle"
        oracle.mkdir()
        with guest, Proxy(str(self.folder / "proxy"), guest.qmp[0], guest.qmp[1], oracle) as proxy:
            for number in range(len(KINDS)):
                guest.run(f"write disk{number} 0 24M {number + 1}")
                guest.run(f"start w{number} disk{number} from=16M to=48M zero=15 discard=15 seed={number + 7}")
            for round_ in range(1, 5):
                self.change(guest, round_)
                plugin = self.plugin(carrier)
                began = plugin.call("backup.begin", {
                    "monitor": str(self.folder / "proxy"), "checkpoint": f"c{round_}",
                    "base": f"c{round_ - 1}" if round_ > 1 else None}, SECONDS)
                pulls = [Pull(plugin, began["backup"], f"dev{number}", images[number])
                         for number in range(len(KINDS))]
                for disk, pull in zip(began["disks"], pulls):
                    pull.result()
                    self.look(round_, disk, pull)
                plugin.call("backup.commit", {"backup": began["backup"], "delete_checkpoints": [f"c{round_ - 1}"]
                                              if round_ > 1 else []}, SECONDS)
                plugin.close()
                self.assertEqual(proxy.wait(round_)["errors"], {})
                for number, image in enumerate(images):
                    truth = (oracle / f"{round_}/disk{number}.raw").read_bytes()
                    self.assertTrue(image == truth, f"round {round_}, {KINDS[number]}: {first(image, truth)}")
            for number in range(len(KINDS)):
                self.assertGreater(guest.stat(f"stop w{number}")["writes"], 10)
            with Qmp(guest.qmp[0]) as qmp:
                self.assert_clean(qmp)

    def change(self, guest, round_):
        """Large old ranges become zeros, each in its own way, where no writer is."""
        for number in range(len(KINDS)):
            at = 2 * round_
            guest.run(f"zero disk{number} {at}M 512K")
            guest.run(f"zeroout disk{number} {at}M 64K")
            guest.run(f"discard disk{number} {at * 1024 + 1024}K 512K")
            guest.run(f"write disk{number} {at * 1024 + 1536}K 8K {round_}")

    def look(self, round_, disk, pull):
        full = round_ == 1
        self.assertEqual(disk["mode"], "full" if full else "incremental", disk)
        self.assertNotIn("reason", disk)
        if full:
            self.assertNotIn("same", pull.kinds())
        else:
            self.assertIn("same", pull.kinds())
            self.assertTrue(pull.covers("same", 12 * MIB, 16 * MIB), "the part that nobody writes")
            at = 2 * round_ * MIB
            self.assertTrue(pull.covers("zero", at, at + MIB // 2), "what became zeros")


def first(image, truth):
    """Where two images differ first."""
    for offset in range(0, len(truth), 4096):
        if image[offset:offset + 4096] != truth[offset:offset + 4096]:
            return f"they differ at {offset}"
    return f"{len(image)} bytes, and should be {len(truth)}"


if __name__ == "__main__":
    unittest.main()
