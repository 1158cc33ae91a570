"""A random walk over two disks and their checkpoints, and a model that knows what changed when.

The model has each disk's bytes, and of each checkpoint the bytes at its point in time and
which granules were written since. Every answer of the plugin is held against it, and so
is every byte of every backup. The same seed walks the same way.
"""

import dataclasses
import pathlib
import random
import shutil
import tempfile
import typing

from . import support
from .machines import Vm, io, make_image, virtio
from .qmp import Qmp
from .support import Backup, PluginError

UNIT = 4096  # the finest granularity, and the model's
CLUSTER = 65536
CHAINS = ("one", "two")
NAMES = ("a", "b", "c", "d")
SECONDS = 60


@dataclasses.dataclass
class Checkpoint:
    """One on one disk. `image` is None where it has no point in time."""

    id: typing.Optional[str]
    image: typing.Optional[bytes]
    granularity: int
    dirty: set = dataclasses.field(default_factory=set)  # units, as wide as its granules are
    recording: bool = True
    inconsistent: bool = False
    stored: bool = False  # in the image file, by an orderly end of QEMU
    time_ms: int = 0

    @property
    def health(self):
        if self.inconsistent:
            return "inconsistent"
        if not self.recording:
            return "not_recording"
        return "usable" if self.id else "gap"

    def widen(self, units):
        """These units, in whole granules of this checkpoint."""
        per = self.granularity // UNIT
        return {first + n for unit in units for first in [unit // per * per] for n in range(per)}


@dataclasses.dataclass
class Disk:
    """A disk, and its checkpoints by (chain, name)."""

    name: str
    format: str
    now: bytearray
    checkpoints: dict = dataclasses.field(default_factory=dict)

    def write(self, offset, data):
        self.now[offset : offset + len(data)] = data
        units = range(offset // UNIT, (offset + len(data) - 1) // UNIT + 1)
        for checkpoint in self.checkpoints.values():
            if checkpoint.recording and not checkpoint.inconsistent:
                checkpoint.dirty |= checkpoint.widen(units)

    def bytes_of(self, units):
        """How many bytes units have, cut at the disk's end."""
        return sum(max(0, min(UNIT, len(self.now) - unit * UNIT)) for unit in units)


REASONS = {"inconsistent": "base_inconsistent", "not_recording": "base_not_recording", "gap": "base_gap"}


class Walk:
    """One walk: `run(steps)`; `log` has what was done."""

    def __init__(self, test, seed):
        self.test = test
        self.random = random.Random(seed)
        self.folder = pathlib.Path(tempfile.mkdtemp(prefix="fleece-walk-"))
        self.places = support.Places()
        self.log = []
        self.counts = {}
        self.streams = {}  # chains of stored streams that make a point in time, by its id
        self.vm = self.qmp = self.plugin = None
        sizes = {"dev-a": ("qcow2", 4 * (1 << 20) + 3 * 4096), "dev-b": ("raw", 2 * (1 << 20) + 512)}
        self.disks = {name: Disk(name, format, bytearray(size)) for name, (format, size) in sizes.items()}
        for disk in self.disks.values():
            make_image(self.image(disk), disk.format, len(disk.now))

    def image(self, disk):
        return self.folder / f"{disk.name}.img"

    def close(self):
        for each in (self.plugin, self.qmp, self.vm, self.places):
            if each:
                each.close()
        shutil.rmtree(self.folder)

    # --- the machine ------------------------------------------------------------------

    def boot(self):
        if self.plugin:
            self.plugin.close()
            self.qmp.close()
            self.vm.close()
        disks = self.disks.values()
        arguments = sum((virtio(disk.name[-1], self.image(disk), disk.format) for disk in disks), [])
        self.vm = Vm(arguments)
        self.qmp = Qmp(self.vm.qmp[1])
        self.plugin = self.places.plugin()

    def io(self, disk, command):
        io(self.qmp, f"/machine/peripheral/{disk.name}/virtio-backend", command)

    def call(self, method, **params):
        params = {"monitor": f"unix:{self.vm.qmp[0]}", **params}
        return self.plugin.call(method, params, SECONDS)

    # --- steps ------------------------------------------------------------------------

    def run(self, steps):
        self.boot()
        weights = {
            self.step_write: 30, self.step_create: 10, self.step_backup: 22, self.step_delete: 7, self.step_merge: 6,
            self.step_disable: 3, self.step_enable: 3, self.step_redefine: 4, self.step_repair: 2,
            self.step_restart: 2, self.step_kill: 1, self.step_restore: 3, self.step_plugin: 1,
        }
        for number in range(steps):
            step = self.random.choices(list(weights), list(weights.values()))[0]
            name = step.__name__.removeprefix("step_")
            self.counts[name] = self.counts.get(name, 0) + 1
            self.say(number, name)
            step()
            self.check()

    def say(self, *words):
        self.log.append(" ".join(str(word) for word in words))

    def step_write(self):
        for _ in range(self.random.randint(1, 3)):
            self.write(self.random.choice(list(self.disks.values())))

    def write(self, disk, kinds=("data", "data", "zero", "discard")):
        kind = self.random.choice(kinds)
        grain = CLUSTER if kind == "discard" else 512
        length = grain * self.random.randint(1, max(1, self.random.choice([2048, 65536, 262144]) // grain))
        last = (len(disk.now) - length) // grain
        if last < 0:
            return
        offset = grain * self.random.randint(0, last)
        value = self.random.randint(1, 255) if kind == "data" else 0
        command = {"data": f"write -P {value}", "zero": "write -z", "discard": "discard"}[kind]
        self.say("   ", disk.name, command, offset, length)
        self.io(disk, f"{command} {offset} {length}")
        disk.write(offset, bytes([value]) * length)

    def place(self):
        return self.random.choice(CHAINS), self.random.choice(NAMES)

    def some_disks(self):
        """None, for all, or some."""
        return self.random.choice([None, None, None, ["dev-a"], ["dev-b"], ["dev-b", "dev-a"]])

    def attempt(self, expected, method, **params):
        """Calls; `expected` is None or the error's code. The result, or None."""
        self.say("   ", method, params, expected or "")
        if expected is None:
            return self.call(method, **params)
        try:
            self.call(method, **params)
        except PluginError as error:
            self.test.assertEqual(expected, error.code, str(error))
            self.test.assertEqual("unchanged", error.data["state_left"])
            return None
        raise AssertionError(f"{method} was not refused with {expected}")

    def holders(self, chosen, keys):
        """The disks of a request that have all of these, or the error's code."""
        disks = [self.disks[name] for name in chosen or self.disks]
        having = [disk for disk in disks if all(key in disk.checkpoints for key in keys)]
        if not having or chosen and len(having) < len(disks):
            return [], "unknown_checkpoint"
        return having, None

    @staticmethod
    def named(chosen):
        return {"disks": chosen} if chosen else {}

    def step_create(self):
        (chain, name), chosen = self.place(), self.some_disks()
        grain = self.random.choice([None, None, 4096, 262144])
        disks = [self.disks[disk] for disk in chosen or self.disks]
        exists = any((chain, name) in disk.checkpoints for disk in disks)
        more = {"granularity": grain} if grain else {}
        result = self.attempt("checkpoint_exists" if exists else None, "checkpoint.create",
                              chain=chain, checkpoint=name, **more, **self.named(chosen))
        for told in result["disks"] if result else []:
            disk = self.disks[told["disk"]]
            made = told["checkpoints"][0]
            new = Checkpoint(made["id"], bytes(disk.now), grain or CLUSTER, time_ms=made["time_ms"])
            disk.checkpoints[chain, name] = new

    def step_delete(self):
        chain = self.random.choice(CHAINS)
        names, chosen = self.random.sample(NAMES, self.random.randint(1, 2)), self.some_disks()
        found = [self.holders(chosen, [(chain, name)]) for name in names]
        error = next((error for _, error in found if error), None)
        result = self.attempt(error, "checkpoint.delete", chain=chain, checkpoints=names, **self.named(chosen))
        if result:
            gone = [f"{disk.name}/{name}" for name, (disks, _) in zip(names, found) for disk in disks]
            self.test.assertEqual(sorted(gone), sorted(result["deleted"]))
            for name, (disks, _) in zip(names, found):
                for disk in disks:
                    del disk.checkpoints[chain, name]

    def toggle(self, method, change):
        key, chosen = self.place(), self.some_disks()
        disks, error = self.holders(chosen, [key])
        if not error and any(disk.checkpoints[key].inconsistent for disk in disks):
            error = "checkpoint_unusable"
        if self.attempt(error, f"checkpoint.{method}", chain=key[0], checkpoint=key[1], **self.named(chosen)):
            for disk in disks:
                change(disk.checkpoints[key])

    def step_disable(self):
        self.toggle("disable", lambda checkpoint: setattr(checkpoint, "recording", False))

    def step_enable(self):
        def enable(checkpoint):
            if not checkpoint.recording and checkpoint.id:
                # A new bitmap, under a name without a point in time.
                checkpoint.id = checkpoint.image = None
                checkpoint.stored = False
            checkpoint.recording = True

        self.toggle("enable", enable)

    def step_merge(self):
        chain = self.random.choice(CHAINS)
        names, into = self.random.sample(NAMES, self.random.randint(1, 3)), self.random.choice(NAMES)
        chosen, delete = self.some_disks(), self.random.random() < 0.5
        disks, error = self.holders(chosen, [(chain, name) for name in names])
        for disk in disks if not error else []:
            if into not in names and (chain, into) in disk.checkpoints:
                error = error or "checkpoint_exists"
            if any(disk.checkpoints[chain, name].inconsistent for name in names):
                error = error or "checkpoint_unusable"
        result = self.attempt(error, "checkpoint.merge", chain=chain, checkpoint=into, delete_sources=delete,
                              **{"from": names}, **self.named(chosen))
        for told in result["disks"] if result else []:
            self.merged(self.disks[told["disk"]], chain, into, names, delete, told["checkpoints"][0])

    def merged(self, disk, chain, into, names, delete, told):
        """The result has a point in time of one that could serve, and all changes of all."""
        sources = [disk.checkpoints[chain, name] for name in names]
        usable = {source.id: source for source in sources if source.health == "usable"}
        self.test.assertEqual(bool(usable), "id" in told, told)
        point = usable.get(told.get("id"))
        self.test.assertEqual(point is not None, bool(usable), told)
        result = Checkpoint(told.get("id"), point and point.image, told["granularity"], time_ms=told["time_ms"])
        there = disk.checkpoints.get((chain, into))
        if there and (there.id, there.time_ms) == (result.id, result.time_ms):
            result.stored = there.stored  # the others were merged into it
        result.recording = any(source.recording for source in sources)
        result.dirty = result.widen(set().union(*(source.dirty for source in sources)))
        if delete:
            for name in names:
                del disk.checkpoints[chain, name]
        disk.checkpoints[chain, into] = result

    def step_redefine(self):
        """By the host's word, which is true: the changes since an image that it has."""
        (chain, name), disk = self.place(), self.random.choice(list(self.disks.values()))
        kind = self.random.choice(["ranges", "ranges", "all", "recorded"])
        there = disk.checkpoints.get((chain, name))
        images = [each.image for each in disk.checkpoints.values() if each.image] or [bytes(disk.now)]
        image, error = self.random.choice(images), None
        if kind == "recorded":
            changed, image = "recorded", there and there.image
            if there is None:
                error = "unknown_checkpoint"
            elif there.inconsistent:
                error = "checkpoint_unusable"
            elif there.health != "usable":
                return  # The host cannot know that nothing was written meanwhile.
        elif kind == "all":
            changed = "all"
        else:
            units = range((len(disk.now) + UNIT - 1) // UNIT)
            spans = [(unit * UNIT, min(UNIT, len(disk.now) - unit * UNIT)) for unit in units]
            changed = [span for span in spans if image[span[0] : sum(span)] != disk.now[span[0] : sum(span)]]
        result = self.attempt(error, "checkpoint.redefine", chain=chain, checkpoint=name,
                              disks=[{"disk": disk.name, "changed": changed}])
        if result:
            told = result["disks"][0]["checkpoints"][0]
            new = Checkpoint(told["id"], image, told["granularity"], time_ms=told["time_ms"])
            dirty = there.dirty if kind == "recorded" else range((len(disk.now) + UNIT - 1) // UNIT)
            if kind == "ranges":
                dirty = {offset // UNIT for offset, _ in changed}
            new.dirty = new.widen(dirty)
            disk.checkpoints[chain, name] = new

    # --- the end of QEMU --------------------------------------------------------------

    def step_restart(self):
        self.qmp.command("quit")
        self.vm.process.wait(SECONDS)
        for disk in self.disks.values():
            if disk.format == "raw":
                disk.checkpoints.clear()
            for checkpoint in disk.checkpoints.values():
                checkpoint.stored = True
        self.boot()

    def step_kill(self):
        for disk in self.disks.values():
            self.io(disk, "flush")
        self.vm.process.kill()
        self.vm.process.wait()
        for disk in self.disks.values():
            kept = disk.checkpoints if disk.format == "qcow2" else {}
            disk.checkpoints = {key: each for key, each in kept.items() if each.stored}
            for checkpoint in disk.checkpoints.values():
                checkpoint.inconsistent, checkpoint.recording = True, False
        self.boot()

    def step_repair(self):
        chain = self.random.choice(CHAINS)
        result = self.call("checkpoint.repair", chain=chain)
        for told in result["disks"]:
            disk = self.disks[told["disk"]]
            gone = [key for key, each in disk.checkpoints.items() if key[0] == chain and each.inconsistent]
            self.test.assertEqual(len(gone), len(told["removed"]), told)
            for key in gone:
                del disk.checkpoints[key]
            usable = {key[1] for key, each in disk.checkpoints.items() if key[0] == chain and each.health == "usable"}
            self.test.assertEqual(usable, {each["checkpoint"] for each in told["usable"]})

    def step_plugin(self):
        self.plugin.close()
        self.plugin = self.places.plugin()

    # --- backups ----------------------------------------------------------------------

    def planned(self, disk, key, id):
        """Why a base makes the disk full; None: it is incremental. And the checkpoint."""
        found = disk.checkpoints.get(key)
        if found is None:
            elsewhere = any(key in other.checkpoints for other in self.disks.values())
            lost = id is not None or disk.format == "raw" and elsewhere
            return ("bitmap_lost" if lost else "base_missing"), None
        reason = REASONS.get(found.health)
        if reason is None and id is not None and id != found.id:
            reason = "base_mismatch"
        return reason, found

    def step_backup(self):
        chain, base = self.place()
        base = self.random.choice([None, base, base, base])
        new = self.random.choice([None, self.random.choice(NAMES)])
        strict = self.random.random() < 0.2
        choices, plans = [], {}
        for disk in self.disks.values():
            choice = {"disk": disk.name}
            found = disk.checkpoints.get((chain, base))
            if base and self.random.random() < 0.5:
                choice["base_id"] = (found and found.id) or "wrong"
                if self.random.random() < 0.1:
                    choice["base_id"] = "wrong"
            choices.append(choice)
            plans[disk.name] = self.planned(disk, (chain, base), choice.get("base_id")) if base else (None, None)
        params = {"chain": chain, "disks": choices, "base": base}
        guess = {disk["disk"]: disk for disk in self.call("backup.estimate", **params)["disks"]}
        error = self.first_error(plans, (chain, new), strict)
        params.update({"checkpoint": new, "strict": strict})
        if error:
            self.attempt(error, "backup.begin", **params)
            return
        self.say("    backup", params)
        backup = Backup(self.plugin, f"unix:{self.vm.qmp[0]}", **params)
        instant = {disk.name: bytes(disk.now) for disk in self.disks.values()}
        ids = {name: told.get("checkpoint_id") for name, told in backup.disks.items()}
        pending = {
            name: Checkpoint(ids[name], image, CLUSTER, time_ms=backup.reply["time_ms"])
            for name, image in instant.items()
        }
        for disk in self.disks.values():
            self.began(disk, backup.disks[disk.name], guess[disk.name], plans[disk.name])
        # The guest goes on, before, between and behind the reads.
        self.while_open(pending, new)
        for disk in self.disks.values():
            self.read(backup, disk, plans[disk.name], instant[disk.name], pending[disk.name], new)
            self.while_open(pending, new)
        if new is None or self.random.random() < 0.3:
            self.test.assertEqual([], backup.abort()["leftovers"])
            return
        kept = self.random.sample(list(self.disks), self.random.randint(1, 2))
        delete = self.random.sample(NAMES, self.random.randint(0, 2))
        delete = [name for name in delete if name != new]
        self.say("    commit", kept, delete)
        result = backup.commit(disks=kept, delete_checkpoints=delete)
        self.test.assertEqual((set(kept), []), (set(result["committed"]), result["leftovers"]))
        for name in kept:
            disk = self.disks[name]
            disk.checkpoints[chain, new] = pending[name]
            for old in delete:
                disk.checkpoints.pop((chain, old), None)

    def first_error(self, plans, new, strict):
        """Of each disk its base is looked at, then the new name."""
        for disk in self.disks.values():
            if strict and plans[disk.name][0]:
                return "base_unusable"
            if new in disk.checkpoints:
                return "checkpoint_exists"
        return None

    def began(self, disk, told, guess, plan):
        reason, base = plan
        mode = "incremental" if base and not reason else "full"
        self.test.assertEqual((mode, reason), (told["mode"], told.get("reason")), told)
        changed = disk.bytes_of(base.dirty) if mode == "incremental" else len(disk.now)
        self.test.assertEqual(changed, told["changed_bytes"], told)
        for member in ("mode", "reason", "base", "size"):
            self.test.assertEqual(guess.get(member), told.get(member))
        self.test.assertGreaterEqual(guess["changed_bytes"], changed)
        self.test.assertLess(guess["changed_bytes"] - changed, CLUSTER * 4, "only the end is cut")

    def while_open(self, pending, new):
        """Writes while a backup is open; its checkpoint to be records them."""
        if self.random.random() < 0.5:
            return
        disk = self.random.choice(list(self.disks.values()))
        disk.checkpoints["pending", "pending"] = pending[disk.name]
        # A point in time's filter passes no discard on.
        self.write(disk, ("data", "zero"))
        del disk.checkpoints["pending", "pending"]

    def read(self, backup, disk, plan, instant, pending, new):
        reason, base = plan
        incremental = base is not None and not reason
        target = self.folder / f"{disk.name}.restored"
        target.write_bytes(base.image if incremental else b"")
        keep = self.folder / f"{backup.id}.{disk.name}.stream"
        changed = set(base.dirty) if incremental else set()
        backup.read(disk.name, target, keep=keep)
        stream = backup.streams[disk.name]
        if target.read_bytes() != instant:
            raise AssertionError(f"{disk.name}: the backup is not the disk at its point in time")
        if incremental:
            for record in stream.records:
                if record["kind"] in ("data", "zero"):
                    units = range(record["offset"] // UNIT, (record["offset"] + record["length"] - 1) // UNIT + 1)
                    self.test.assertLessEqual(set(units), changed, "more was read than was written")
        before = self.streams.get(base.id) if incremental else []
        if before is not None and (not before or before[-1][1] == stream.begin["base"]):
            self.streams[pending.id] = [*before, (keep, new, instant)]
        else:
            keep.unlink()

    def step_restore(self):
        """A chain of streams that were kept, back to an image."""
        if not self.streams:
            return
        chain = self.random.choice(list(self.streams.values()))
        size, target = len(chain[-1][2]), self.folder / "restore.raw"
        begin = {"target": str(target), "format": "raw", "size": size}
        restore = self.plugin.call("restore.begin", begin, SECONDS)["restore"]
        waiting = []
        for path, _, _ in chain:
            with open(path, "rb") as file:
                for record, payload in support.read_stream(file):
                    params = {"restore": restore, "record": record}
                    waiting.append(self.plugin.start("restore.write", params, payload))
                    if len(waiting) > 8:
                        waiting.pop(0).result(SECONDS)
        for future in waiting:
            future.result(SECONDS)
        self.plugin.call("restore.finish", {"restore": restore}, SECONDS)
        self.say("    restored", len(chain), "streams")
        if target.read_bytes() != chain[-1][2]:
            raise AssertionError("the restored image is not the disk at its point in time")
        target.unlink()
        if len(self.streams) > 40:
            self.forget()

    def forget(self):
        """All streams but those that live checkpoints need."""
        ids = {each.id for disk in self.disks.values() for each in disk.checkpoints.values()}
        self.streams = {id: chain for id, chain in self.streams.items() if id in ids}
        needed = {path for chain in self.streams.values() for path, _, _ in chain}
        for path in self.folder.glob("*.stream"):
            if path not in needed:
                path.unlink()

    # --- after each step --------------------------------------------------------------

    def check(self):
        """The plugin tells of each checkpoint what the model knows, and nothing is left."""
        for told in self.call("checkpoint.list", all_chains=True)["disks"]:
            disk = self.disks[told["disk"]]
            expected = {key: self.expected(disk, each) for key, each in disk.checkpoints.items()}
            found = {}
            for each in told["checkpoints"]:
                if each["health"] != "missing":
                    members = ("health", "id", "recording", "dirty_bytes", "granularity")
                    found[each["chain"], each["checkpoint"]] = tuple(each.get(member) for member in members)
            self.test.assertEqual(expected, found)
        self.test.assertEqual([], support.ours(self.qmp))
        self.test.assertEqual([], self.places.files())

    @staticmethod
    def expected(disk, checkpoint):
        # A coarse granule at the disk's end reaches behind it; merged into finer ones it does not.
        units = [unit for unit in checkpoint.dirty if unit * UNIT < len(disk.now)]
        granules = {unit // (checkpoint.granularity // UNIT) for unit in units}
        dirty = min(len(granules) * checkpoint.granularity, len(disk.now))
        return (
            checkpoint.health,
            checkpoint.id,
            checkpoint.recording and not checkpoint.inconsistent,
            None if checkpoint.inconsistent else dirty,
            checkpoint.granularity,
        )
