"""checkpoint.*: made, joined, deleted and redefined without a backup, and right as bases."""

import shutil

from . import support
from .guest import MIB
from .support import Backup, Daemon, Rig, Vm, blockdev, io, make_image, virtio

NODES = {"dev-a": "a", "dev-b": "b"}
DEVICES = {disk: f"/machine/peripheral/{disk}/virtio-backend" for disk in NODES}
KIB = 1024


class Checkpoints(support.Test):
    def setUp(self):
        self.places = support.Places()
        self.addCleanup(self.places.close)
        make_image(self.path("a.qcow2"), "qcow2", 16 * MIB)
        make_image(self.path("b.raw"), "raw", 16 * MIB + 4096)
        self.rig = Rig(Vm(virtio("a", self.path("a.qcow2")) + virtio("b", self.path("b.raw"), "raw")))
        self.addCleanup(self.rig.close)
        self.plugin = self.rig.plugin()
        self.addCleanup(self.plugin.close)
        self.write("write -P 1 0 8M")

    def path(self, name):
        return self.places.folder / name

    def write(self, command, disks=NODES):
        for disk in disks:
            io(self.rig.qmp, DEVICES[disk], command)

    def call(self, method, **params):
        return self.plugin.call(f"checkpoint.{method}", {"monitor": self.rig.monitor, **params}, support.SECONDS)

    def refuse(self, code, method, **params):
        """Refused, and nothing has changed."""
        before = self.bitmaps()
        params = {"monitor": self.rig.monitor, **params}
        data = self.refused(code, self.plugin, f"checkpoint.{method}", params)
        self.assertEqual("unchanged", data["state_left"])
        self.assertEqual(before, self.bitmaps())
        return data

    def bitmaps(self):
        """All bitmaps, without how much is dirty."""
        nodes = self.rig.qmp.command("query-named-block-nodes", {"flat": True})
        return sorted(
            (node["node-name"], bitmap["name"], bitmap["recording"], bitmap["granularity"])
            for node in nodes
            for bitmap in node.get("dirty-bitmaps", [])
        )

    def create(self, name, **params):
        """A checkpoint, with a full of the same instant in NAME.DISK: nobody writes meanwhile."""
        for disk in NODES:
            self.rig.image(disk).unlink(missing_ok=True)
        full = Backup(self.plugin, self.rig.monitor)
        full.read_all(self.rig)
        full.abort()
        for disk in NODES:
            shutil.copy(self.rig.image(disk), self.path(f"{name}.{disk}"))
        return self.call("create", checkpoint=name, **params)

    def incremental(self, image, **params):
        """A backup, incremental on all disks, over the images of `image`: each byte right."""
        for disk in NODES:
            shutil.copy(self.path(f"{image}.{disk}"), self.rig.image(disk))
        estimate = self.estimate(**params)
        backup = Backup(self.plugin, self.rig.monitor, strict=True, **params)
        for disk, found in backup.disks.items():
            self.assertEqual("incremental", found["mode"], disk)
            self.assertEqual(found["changed_bytes"], estimate[disk]["changed_bytes"], disk)
        backup.read_all(self.rig)
        self.rig.compare(self, backup, NODES)
        for disk, stream in backup.streams.items():
            end = stream.end
            self.assertEqual(backup.disks[disk]["changed_bytes"], end["data_bytes"] + end["zero_bytes"], disk)
        self.assertEqual([], backup.abort()["leftovers"])
        return backup

    def estimate(self, **params):
        result = self.plugin.call("backup.estimate", {"monitor": self.rig.monitor, **params}, support.SECONDS)
        return {disk["disk"]: disk for disk in result["disks"]}

    # --- one by one -------------------------------------------------------------------

    def test_a_checkpoint_made_without_a_backup_is_a_base(self):
        made = self.create("one")
        for disk in made["disks"]:
            (checkpoint,) = disk["checkpoints"]
            self.assertEqual(("usable", 0, True), tuple(checkpoint[m] for m in ("health", "dirty_bytes", "recording")))
        self.write("write -P 2 1M 128K")
        self.write("write -z 4M 1M")
        backup = self.incremental("one", base="one")
        for stream in backup.streams.values():
            self.assertEqual({"zero"}, stream.kinds(4 * MIB, 5 * MIB))
            self.assertEqual({"same"}, stream.kinds(2 * MIB, 3 * MIB))

    def test_each_stands_alone(self):
        """Older bases serve, in whatever order others are deleted."""
        for number, name in enumerate(["one", "two", "three", "four"]):
            self.create(name)
            self.write(f"write -P {number + 2} {number}M 64K")
        for gone, base in (("two", "one"), ("four", "three"), ("one", "three")):
            self.assertEqual(
                [f"{disk}/{gone}" for disk in NODES], self.call("delete", checkpoints=[gone])["deleted"]
            )
            self.write("write -P 9 9M 64K")
            self.incremental(base, base=base)
        self.assertEqual({disk: ["three"] for disk in NODES}, self.rig.checkpoints(self.plugin))

    def test_chains_do_not_meet(self):
        self.create("same")
        self.write("write -P 2 1M 64K")
        self.create("same", chain="other")
        self.write("write -P 3 2M 64K")
        self.assertEqual({disk: {"same": "usable"} for disk in NODES}, self.rig.health(self.plugin))
        every = self.call("list", all_chains=True)["disks"]
        self.assertEqual(["default", "other"], [each["chain"] for each in every[0]["checkpoints"]])
        other = self.incremental("same", base="same", chain="other")  # the images are the later ones
        self.assertEqual(64 * KIB, other.disks["dev-a"]["changed_bytes"])
        self.refuse("unknown_checkpoint", "delete", checkpoints=["same"], chain="third")
        self.assertEqual("base_missing", self.estimate(base="same", chain="third")["dev-a"]["reason"])
        params = {"monitor": self.rig.monitor, "base": "same", "chain": "third", "strict": True}
        data = self.refused("base_unusable", self.plugin, "backup.begin", params)
        self.assertEqual(("base_missing", "take_full"), (data["reason"], data["action"]))
        self.call("delete", checkpoints=["same"])
        self.assertEqual({disk: {} for disk in NODES}, self.rig.health(self.plugin))
        self.incremental("same", base="same", chain="other")
        # A commit deletes in its own chain only.
        backup = Backup(self.plugin, self.rig.monitor, checkpoint="next")
        backup.read_all(self.rig)
        self.assertEqual([], backup.commit(delete_checkpoints=["same"])["deleted"])
        self.assertEqual({"same": "usable"}, self.rig.health(self.plugin, chain="other")["dev-a"])

    def test_fine_and_coarse_ones_count_their_own_granules(self):
        self.create("fine", granularity=4096)
        self.call("create", checkpoint="coarse", granularity=MIB)
        self.write("write -P 2 0 4K")
        self.write("write -P 2 6M 4K")
        # A read is as fine as the checkpoint: 4 KiB of each cluster change hands.
        fine = self.incremental("fine", base="fine")
        coarse = self.incremental("fine", base="coarse")
        self.assertEqual((8192, 2 * MIB), tuple(one.disks["dev-a"]["changed_bytes"] for one in (fine, coarse)))
        listed = self.call("list")["disks"][0]["checkpoints"]
        self.assertEqual([16 * MIB // 4096 // 8, 2], [each["memory_bytes"] for each in listed])

    def test_a_disabled_one_is_no_base_also_when_it_records_again(self):
        self.create("one")
        self.create("two")
        self.write("write -P 2 1M 64K")
        self.call("disable", checkpoint="one")
        self.write("write -P 3 2M 64K")
        self.assertEqual({"one": "not_recording", "two": "usable"}, self.rig.health(self.plugin)["dev-a"])
        self.assertEqual("base_not_recording", self.estimate(base="one")["dev-a"]["reason"])
        self.call("enable", checkpoint="one")
        self.write("write -P 4 3M 64K")
        self.assertEqual({"one": "gap", "two": "usable"}, self.rig.health(self.plugin)["dev-a"])
        estimate = self.estimate(base="one")["dev-a"]
        self.assertEqual(("full", "base_gap", 16 * MIB), tuple(estimate[m] for m in ("mode", "reason", "changed_bytes")))
        dirty = {each["checkpoint"]: each["dirty_bytes"] for each in self.call("list")["disks"][0]["checkpoints"]}
        self.assertEqual({"one": 128 * KIB, "two": 192 * KIB}, dirty)
        # Twice is once.
        before = self.bitmaps()
        self.call("enable", checkpoint="one")
        self.assertEqual(before, self.bitmaps())
        # The host vouches for it, with what it missed.
        words = [{"disk": disk, "changed": "recorded", "id": f"id{disk[-1]}"} for disk in NODES]
        self.write("write -P 3 2M 64K")
        self.call("redefine", checkpoint="one", disks=words)
        disks = [{"disk": disk, "base_id": f"id{disk[-1]}"} for disk in NODES]
        self.incremental("one", base="one", disks=disks)

    # --- joined -----------------------------------------------------------------------

    def test_merged_across_granularities(self):
        self.create("one", granularity=MIB)
        self.write("write -P 2 1M 4K")
        self.create("two", granularity=4096)
        self.write("write -P 3 5M 4K")
        self.call("merge", checkpoint="both", **{"from": ["two", "one"]}, delete_sources=True)
        self.write("write -P 4 7M 4K")
        self.assertEqual({disk: {"both": "usable"} for disk in NODES}, self.rig.health(self.plugin))
        # It tracks from the older one on.
        backup = self.incremental("one", base="both")
        self.assertEqual(2 * MIB + 4096, backup.disks["dev-a"]["changed_bytes"])

    def test_merged_into_one_of_them(self):
        self.create("one")
        self.write("write -P 2 1M 64K")
        self.create("two")
        self.call("merge", checkpoint="one", **{"from": ["one", "two"]}, delete_sources=True)
        self.assertEqual({disk: {"one": "usable"} for disk in NODES}, self.rig.health(self.plugin))
        self.incremental("one", base="one")
        self.create("three")
        self.call("merge", checkpoint="three", **{"from": ["one", "three"]})
        self.incremental("one", base="three")

    def test_a_union_of_what_does_not_join_is_no_base(self):
        self.create("one")
        self.write("write -P 2 1M 64K")
        self.call("disable", checkpoint="one")
        merged = self.call("merge", checkpoint="frozen", **{"from": ["one"]})["disks"][0]["checkpoints"][0]
        self.assertEqual((False, 64 * KIB), (merged["recording"], merged["dirty_bytes"]))
        self.assertNotEqual("usable", merged["health"])
        self.create("two")
        merged = self.call("merge", checkpoint="later", **{"from": ["one", "two"]})["disks"][0]["checkpoints"][0]
        self.assertEqual(("usable", 64 * KIB), (merged["health"], merged["dirty_bytes"]))
        self.write("write -P 3 3M 64K")
        self.incremental("two", base="later")

    # --- the host's word --------------------------------------------------------------

    def test_redefined_from_ranges(self):
        self.create("one")
        self.write("write -P 2 1M 100K")
        self.write("write -z 12M 64K")
        self.call("delete", checkpoints=["one"])
        words = [
            {"disk": "dev-a", "id": "known1", "changed": [[12 * MIB, 64 * KIB], [MIB, 100 * KIB]]},
            {"disk": "dev-b", "id": "known1", "changed": "all"},
        ]
        made = self.call("redefine", checkpoint="one", disks=words)["disks"]
        told = [(disk["checkpoints"][0]["health"], disk["checkpoints"][0]["dirty_bytes"]) for disk in made]
        self.assertEqual([("usable", 192 * KIB), ("usable", 16 * MIB + 4096)], told)
        self.assertEqual([], support.ours(self.rig.qmp))
        self.assertEqual([], self.rig.files())
        self.write("write -P 3 15M 4K")
        disks = [{"disk": disk, "base_id": "known1"} for disk in NODES]
        self.incremental("one", base="one", disks=disks)
        # Again: the one that is there is replaced, as the ranges of now say.
        words = [{"disk": disk, "changed": [], "id": "known2"} for disk in NODES]
        self.create("copy")
        self.call("redefine", checkpoint="one", disks=words, granularity=4096)
        self.write("write -P 4 2M 4K")
        backup = self.incremental("copy", base="one")
        self.assertEqual(4096, backup.disks["dev-a"]["changed_bytes"])
        self.assertEqual(2, len(self.call("list")["disks"][0]["checkpoints"]))

    def test_a_redefinition_that_cannot_be_done_changes_nothing(self):
        self.create("one")

        def refuse(code, *words, **params):
            data = self.refuse(code, "redefine", checkpoint="one", disks=list(words), **params)
            self.assertEqual([], support.ours(self.rig.qmp))
            self.assertEqual([], self.rig.files())
            return data

        good = {"disk": "dev-b", "changed": "all"}
        data = refuse("invalid_params", good, {"disk": "dev-a", "changed": [[0, 512], [16 * MIB - 512, 1024]]})
        self.assertEqual(("dev-a", 16 * MIB - 512), (data["disk"], data["offset"]))
        refuse("invalid_params", {"disk": "dev-a", "changed": [[4096, 0]]})
        refuse("invalid_params", {"disk": "dev-a", "changed": [[(1 << 64) - 1, 2]]})
        refuse("invalid_params", {"disk": "dev-a", "changed": [[-1, 2]]})
        refuse("invalid_params", {"disk": "dev-a", "changed": "some"})
        refuse("invalid_params", {"disk": "dev-a", "changed": [[0, 1]] * 262_145})
        refuse("invalid_params", {**good, "id": "Not-an-id"})
        refuse("invalid_params", good, good)
        refuse("invalid_params", good, granularity=1000)
        refuse("unknown_disk", good, {"disk": "dev-c", "changed": "all"})
        path = {"path": str(self.path("theirs.sock"))}
        self.rig.qmp.command("nbd-server-start", {"addr": {"type": "unix", "data": path}})
        refuse("nbd_server_busy", good)

    # --- refusals ---------------------------------------------------------------------

    def test_all_disks_or_none(self):
        self.call("create", checkpoint="one", disks=["dev-b"])
        self.assertEqual("dev-b", self.refuse("checkpoint_exists", "create", checkpoint="one")["disk"])
        self.assertEqual("dev-a", self.refuse("unknown_checkpoint", "delete", checkpoints=["one"], disks=list(NODES))["disk"])
        self.call("create", checkpoint="two", disks=["dev-a"])
        self.refuse("unknown_checkpoint", "merge", checkpoint="m", **{"from": ["one", "two"]})
        self.refuse("unknown_disk", "create", checkpoint="three", disks=["dev-a", "dev-x"])
        listed = self.call("list")["disks"]
        self.assertEqual(["usable", "missing"], [each["health"] for each in listed[0]["checkpoints"]])

    def test_odd_names_are_refused(self):
        for name in ("", "a/b", "-x", "x" * 65, "ä", "a b", "a\n"):
            self.refuse("invalid_params", "create", checkpoint=name)
            self.refuse("invalid_params", "create", checkpoint="good", chain=name)
            self.refuse("invalid_params", "delete", checkpoints=[name])
            self.refuse("invalid_params", "merge", checkpoint="good", **{"from": [name]})
        self.refuse("invalid_params", "merge", checkpoint="good", **{"from": []})
        self.refuse("invalid_params", "delete", checkpoints=["a"] * 1025)
        self.refuse("invalid_params", "list", checkpoints=["a"] * 1_000_000)
        self.refuse("invalid_params", "create", checkpoint="good", granularity=3)
        self.refuse("invalid_params", "create", checkpoint="good", disks=[])
        longest = self.call("create", checkpoint="x" * 64, chain="y" * 64)
        self.assertEqual("usable", longest["disks"][0]["checkpoints"][0]["health"])

    def test_one_that_is_in_use_waits(self):
        self.call("create", checkpoint="one")
        bitmap = next(name for node, name, *_ in self.bitmaps() if node == "a")
        self.call("disable", checkpoint="one", disks=["dev-a"])  # QEMU exports no other.
        path = {"path": str(self.path("theirs.sock"))}
        self.rig.qmp.command("nbd-server-start", {"addr": {"type": "unix", "data": path}})
        self.rig.qmp.command("block-export-add", {"type": "nbd", "id": "e", "node-name": "a", "bitmaps": [bitmap]})
        self.assertEqual("busy", self.rig.health(self.plugin)["dev-a"]["one"])
        for method, params in (
            ("delete", {"checkpoints": ["one"]}),
            ("enable", {"checkpoint": "one"}),
            ("merge", {"checkpoint": "m", "from": ["one"]}),
            ("redefine", {"checkpoint": "one", "disks": [{"disk": "dev-a", "changed": "recorded"}]}),
        ):
            data = self.refuse("checkpoint_busy", method, **params)
            self.assertEqual(("dev-a", "retry"), (data["disk"], data["action"]))

    def test_one_on_a_backing_image_cannot_be_changed(self):
        self.create("one")
        snapshot = {"node-name": "a", "snapshot-file": str(self.path("o.qcow2")), "snapshot-node-name": "o"}
        self.rig.qmp.command("blockdev-snapshot-sync", snapshot)
        self.assertEqual("on_backing_image", self.rig.health(self.plugin)["dev-a"]["one"])
        self.refuse("checkpoint_unusable", "delete", checkpoints=["one"])
        self.refuse("checkpoint_unusable", "disable", checkpoint="one")
        # What it holds can be taken over, with the host's word that nothing was written since.
        self.call("redefine", checkpoint="one", disks=[{"disk": "dev-a", "changed": "recorded"}])
        self.write("write -P 5 3M 64K")
        for disk in NODES:
            shutil.copy(self.path(f"one.{disk}"), self.rig.image(disk))
        backup = Backup(self.plugin, self.rig.monitor, base="one", strict=True)
        backup.read_all(self.rig)
        self.rig.compare(self, backup, {**NODES, "dev-a": "o"})
        self.assertEqual(64 * KIB, backup.disks["dev-a"]["changed_bytes"])
        backup.abort()

    def test_a_thousand_are_too_many(self):
        """A clear limit per disk, over all chains; the VM goes on, and what is gone makes room."""
        limit = self.plugin.hello["limits"]["max_checkpoints"]
        ours = 0
        for number in range(1000):
            chain = f"chain{number % 3}"
            try:
                self.call("create", checkpoint=f"n{number}", chain=chain, disks=["dev-a"])
                ours += 1
            except support.PluginError as error:
                self.assertEqual(("too_many_checkpoints", "dev-a"), (error.code, error.data["disk"]))
        self.assertEqual(limit, ours)
        many = {"from": [f"n{number}" for number in range(0, limit, 3)]}
        self.refuse("too_many_checkpoints", "merge", checkpoint="m", chain="chain0", **many)
        words = [{"disk": "dev-a", "changed": "all"}]
        self.refuse("too_many_checkpoints", "redefine", checkpoint="m", disks=words)
        self.refused("too_many_checkpoints", self.plugin, "backup.begin",
                     {"monitor": self.rig.monitor, "checkpoint": "m"})
        self.assertEqual([], support.ours(self.rig.qmp))
        self.call("merge", checkpoint="m", chain="chain0", delete_sources=True, **many)
        self.create("new")
        self.write("write -P 7 2M 64K")
        self.incremental("new", base="new")

    def test_a_commit_deletes_where_it_can(self):
        """An old checkpoint that cannot go on one disk goes on the other."""
        self.create("one")
        snapshot = {"node-name": "a", "snapshot-file": str(self.path("o.qcow2")), "snapshot-node-name": "o"}
        self.rig.qmp.command("blockdev-snapshot-sync", snapshot)
        backup = Backup(self.plugin, self.rig.monitor, checkpoint="two")
        backup.read_all(self.rig)
        result = backup.commit(delete_checkpoints=["one"])
        self.assertEqual(["dev-b/one"], result["deleted"])
        (left,) = result["leftovers"]
        self.assertIn("dev-a", left)
        self.assertEqual({"dev-a": {"one": "on_backing_image", "two": "usable"}, "dev-b": {"two": "usable"}},
                         self.rig.health(self.plugin))

    # --- beside a backup --------------------------------------------------------------

    def test_checkpoints_can_be_changed_while_a_backup_is_open(self):
        self.create("one")
        self.write("write -P 2 1M 64K")
        for disk in NODES:
            shutil.copy(self.path(f"one.{disk}"), self.rig.image(disk))
        backup = Backup(self.plugin, self.rig.monitor, base="one", checkpoint="two", strict=True)
        self.refused("disk_excluded", self.plugin, "backup.begin",
                     {"monitor": self.rig.monitor, "disks": [{"disk": "dev-a"}]})
        self.call("create", checkpoint="beside", disks=list(NODES))
        self.write("write -P 3 2M 64K")
        self.call("delete", checkpoints=["one"])
        self.assertEqual({"beside": "usable"}, self.rig.health(self.plugin)["dev-a"])
        self.assertEqual([backup.id], self.call("repair")["open_backups"])
        backup.read_all(self.rig)
        self.rig.compare(self, backup, NODES)
        backup.commit()
        self.assertEqual({"beside": "usable", "two": "usable"}, self.rig.health(self.plugin)["dev-a"])
        # The image is that of `two`, and nothing was written before `beside`.
        for base in ("two", "beside"):
            for disk in NODES:
                shutil.copy(self.rig.image(disk), self.path(f"{base}.{disk}"))
        for base in ("two", "beside"):
            self.incremental(base, base=base)

    def test_a_dead_backups_beginning_is_repaired(self):
        """What a session leaves that has neither job nor node: only bitmaps."""
        self.call("create", checkpoint="one")
        for name in ("qf-abcdefghij-0-new", "qf-abcdefghij-0-inc"):
            self.rig.qmp.command("block-dirty-bitmap-add", {"node": "a", "name": name})
        self.rig.qmp.command("block-dirty-bitmap-add", {"node": "a", "name": "theirs"})
        first = {disk["disk"]: disk for disk in self.call("repair")["disks"]}
        self.assertEqual({"qf-abcdefghij-0-new", "qf-abcdefghij-0-inc"}, set(first["dev-a"]["removed"]))
        self.assertEqual(["one"], [each["checkpoint"] for each in first["dev-a"]["usable"]])
        self.assertEqual(["theirs"], first["dev-a"]["foreign"])
        self.assertEqual([], support.ours(self.rig.qmp))
        before = self.bitmaps()
        again = {disk["disk"]: disk for disk in self.call("repair")["disks"]}
        self.assertEqual([], again["dev-a"]["removed"])
        self.assertEqual(before, self.bitmaps())


class StorageDaemon(support.Test):
    def setUp(self):
        self.places = support.Places()
        self.addCleanup(self.places.close)
        image = self.places.folder / "a.qcow2"
        make_image(image, "qcow2", 16 * MIB)
        self.rig = Rig(Daemon(["--blockdev", blockdev("a", image, "qcow2")]))
        self.addCleanup(self.rig.close)

    def test_a_backup_is_nothing_to_warn_of(self):
        """There is no guest that could stand still."""
        log = self.places.folder / "log"
        with open(log, "wb") as file, support.Plugin(self.rig.command(), stderr=file) as plugin:
            backup = Backup(plugin, self.rig.monitor, checkpoint="one")
            backup.read_all(self.rig)
            self.assertEqual(["a"], backup.commit()["committed"])
        self.assertEqual("", log.read_text())

    def test_checkpoints(self):
        rig = self.rig
        with rig.plugin() as plugin:
            params = {"monitor": rig.monitor, "checkpoint": "one"}
            plugin.call("checkpoint.create", params)
            words = [{"disk": "a", "changed": [[0, 65536]], "id": "x1"}]
            made = plugin.call("checkpoint.redefine", {**params, "disks": words})
            self.assertEqual(65536, made["disks"][0]["checkpoints"][0]["dirty_bytes"])
            self.assertEqual({"a": {"one": "usable"}}, rig.health(plugin))
            self.assertEqual([], support.ours(rig.qmp))
            estimate = plugin.call("backup.estimate", {"monitor": rig.monitor, "base": "one"})["disks"][0]
            self.assertEqual(("incremental", 65536), (estimate["mode"], estimate["changed_bytes"]))
            self.assertEqual({"deleted": ["a/one"]}, plugin.call("checkpoint.delete", {
                "monitor": rig.monitor, "checkpoints": ["one"]}))
