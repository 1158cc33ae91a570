"""VM -> store: one point in time of its disks, stored, then committed."""
import concurrent.futures
import os
import time

from . import checkpoints
from .plugin import PluginError, PluginGone
from .stream import MAX_DATA_BYTES, Checker, Damage, StreamFailed, write_record

# The plugin speaks at least each 10 seconds while a stream is under way.
SILENCE_SECONDS = 120
COMMIT_SECONDS = 120
# What goes wrong with a plugin or its streams, besides the store itself.
FAILURES = (PluginError, PluginGone, StreamFailed, Damage, TimeoutError)


class BackupFailed(Exception):
    """The backup is void; the store is as before."""


class NotCommitted(Exception):
    """The backup is stored, and the VM's new checkpoint is in doubt."""


class Options:
    """What the operator asks for: `disks` None means all that can be backed up.

    `consistency` is what `backup.begin` takes under that name; None: as after a loss of power.
    """

    def __init__(self, monitor, disks=None, full=False, strict=False, scratch_dir=None,
                 consistency=None):
        self.monitor = monitor
        self.disks = disks
        self.full = full
        self.strict = strict
        self.scratch_dir = scratch_dir
        self.consistency = consistency


class StreamSink:
    """Takes one disk's records into its file, held to the rules as they come."""

    def __init__(self, file, planned):
        self.planned = planned
        self.checker = Checker()
        self.stored_bytes = 0
        self.failed = None
        self._file = file
        self._started = time.monotonic()
        self.seconds = None

    def take(self, record, payload):
        """The next record; raises what makes the stream void."""
        try:
            self.checker.take(record, payload)
        except StreamFailed as error:
            # The error reply that follows knows more; this one is kept in case none comes.
            self.failed = error
            return
        if record["kind"] == "begin":
            for member in ("disk", "size", "mode", "base", "checkpoint"):
                if record.get(member) != self.planned.get(member):
                    raise Damage(0, "`begin` has %s %r, backup.begin had %r" % (
                        member, record.get(member), self.planned.get(member)))
        self.stored_bytes += write_record(self._file, record, payload)
        if record["kind"] == "end":
            self.seconds = time.monotonic() - self._started

    def finish(self, reply):
        """The stream is whole and on stable storage; returns its manifest entry's sums."""
        self.checker.finish()
        end = self.checker.end
        if reply.get("digest") != end["digest"]:
            raise Damage(self.checker.offset, "the reply's digest is not the stream's")
        self.close(durably=True)
        sums = {name: end[name] for name in
                ("digest", "records", "data_bytes", "zero_bytes", "same_bytes")}
        return dict(sums, stored_bytes=self.stored_bytes, seconds=round(self.seconds, 3))

    def close(self, durably=False):
        if not self._file.closed:
            if durably:
                self._file.flush()
                os.fsync(self._file.fileno())
            self._file.close()


def run(plugin, store, options, progress):
    """Makes one backup in the locked store and commits it; returns its manifest."""
    vm = plugin.call("vm.inspect", {"monitor": options.monitor})
    store.claim({"name": vm.get("name"), "uuid": vm.get("uuid")})
    # Each store is a chain of its own: others may back the same VM up.
    chain = store.identity()["id"]
    known = checkpoints.of_disks(plugin, options.monitor, chain)
    bases = choose_bases(store, vm, known, options)
    for line in left_out(vm, options):
        progress.say(line)
    new = store.new()
    try:
        request = {"monitor": options.monitor, "chain": chain, "checkpoint": new.checkpoint,
                   "strict": options.strict,
                   "disks": [choice(disk, base) for disk, base in bases.items()]}
        if options.scratch_dir:
            request["scratch"] = {"dir": os.path.abspath(options.scratch_dir)}
        if options.consistency:
            request["consistency"] = options.consistency
        began = plugin.call("backup.begin", request)
        check_began(began, bases, new.checkpoint)
        entries = read_disks(plugin, new, began, bases, progress)
        manifest = {
            "format": 1, "name": new.name, "checkpoint": new.checkpoint,
            "time_ms": began["time_ms"], "plugin": plugin.hello.get("plugin"),
            "vm": {name: vm.get(name) for name in ("name", "uuid", "qemu_version")},
            "consistency": began.get("consistency", {"kind": "crash"}),
            "disks": entries,
        }
        new.finish(manifest)
    except BaseException:
        new.discard()
        raise
    commit(plugin, began["backup"], superseded(store, known, new, bases), progress)
    return manifest


def choice(disk, base):
    """A disk of a request: its base, and which point in time that is."""
    if base is None:
        return {"disk": disk, "base": None}
    chosen = {"disk": disk, "base": base.checkpoint}
    # A base of the same name that is another point in time would make a wrong increment.
    if base.disks[disk].get("checkpoint_id"):
        chosen["base_id"] = base.disks[disk]["checkpoint_id"]
    return chosen


def choose_bases(store, vm, known, options):
    """{disk: the stored backup to build on, or None for a full}."""
    can = {disk["disk"]: disk for disk in vm["disks"]}
    wanted = options.disks
    if wanted is None:
        wanted = [name for name, disk in can.items() if not disk.get("excluded")]
    for name in wanted:
        if name not in can:
            raise BackupFailed("the VM has no disk %s; it has: %s"
                               % (name, ", ".join(can) or "none"))
    if not wanted:
        raise BackupFailed("; ".join(["the VM has no disk that can be backed up",
                                      *left_out(vm, options)]))
    return {name: None if options.full else store.base_for(name, known.get(name, []))
            for name in wanted}


def left_out(vm, options):
    """A line for each disk that all disks do not include: nobody is to miss one unawares."""
    return ["left out: %s (%s)" % (disk["disk"], disk["excluded"]) for disk in vm["disks"]
            if disk.get("excluded") and options.disks is None]


def check_began(began, bases, checkpoint):
    """The plugin opened what was asked for; a full in place of an incremental is no error."""
    if sorted(disk["disk"] for disk in began["disks"]) != sorted(bases):
        raise BackupFailed("backup.begin opened other disks than were asked for")
    for disk in began["disks"]:
        base = bases[disk["disk"]]
        if disk.get("checkpoint") != checkpoint:
            raise BackupFailed("disk %s gets no checkpoint" % disk["disk"])
        if disk["mode"] == "incremental":
            if base is None or disk.get("base") != base.checkpoint:
                raise BackupFailed("disk %s has a base that was not asked for" % disk["disk"])
            if disk["size"] != base.disks[disk["disk"]]["size"]:
                raise BackupFailed("disk %s is incremental although its size changed"
                                   % disk["disk"])


def read_disks(plugin, new, began, bases, progress):
    """Reads all disks side by side into their files; returns their manifest entries."""
    sinks, futures = {}, {}
    try:
        for disk in began["disks"]:
            name = disk["disk"]
            sinks[name] = StreamSink(new.open_stream(name), disk)
        progress.start(sinks.values())
        for name, sink in sinks.items():
            request = {"backup": began["backup"], "disk": name}
            if plugin.limits["max_payload_bytes"] >= MAX_DATA_BYTES:
                request["record_max"] = MAX_DATA_BYTES
            futures[name] = plugin.start("backup.read", request, on_record=sink.take)
            raise_first_error(futures, sinks)
        while not all(future.done() for future in futures.values()):
            concurrent.futures.wait(futures.values(), timeout=0.25,
                                    return_when=concurrent.futures.FIRST_EXCEPTION)
            raise_first_error(futures, sinks)
            if time.monotonic() - plugin.last_heard > SILENCE_SECONDS:
                raise BackupFailed("the plugin said nothing for %d seconds" % SILENCE_SECONDS)
            progress.paint()
        progress.finish()
        return [entry(sink, futures[name].result(), bases[name], new)
                for name, sink in sinks.items()]
    finally:
        for sink in sinks.values():
            sink.close()


def raise_first_error(futures, sinks):
    """Ends the backup as soon as one of its streams has ended wrongly."""
    for name, future in futures.items():
        if not future.done():
            continue
        failed = sinks[name].failed
        error = future.exception() or failed
        if isinstance(error, FAILURES) or isinstance(error, OSError):
            note = " (%s)" % failed if failed and failed is not error else ""
            raise BackupFailed("disk %s: %s%s" % (name, error, note)) from error
        if error:
            raise error


def entry(sink, reply, base, new):
    """A disk in the manifest: what it is, what it builds on, what it must add up to."""
    planned = sink.planned
    # What it cost the VM's side: for the operator, and absent with a plugin that does not tell.
    cost = {name: reply.get(name) for name in ("read_bytes", "scratch_peak")}
    try:
        sums = dict(sink.finish(reply), **cost)
    except Damage as damage:
        raise BackupFailed("disk %s: %s" % (planned["disk"], damage)) from damage
    incremental = planned["mode"] == "incremental"
    return dict({
        "disk": planned["disk"], "size": planned["size"], "mode": planned["mode"],
        "planned": planned.get("planned"), "reason": planned.get("reason"),
        "base": base.name if incremental else None,
        "base_checkpoint": base.checkpoint if incremental else None,
        "checkpoint_id": planned.get("checkpoint_id"),
        "file": new.stream_file(planned["disk"]),
    }, **sums)


def superseded(store, known, new, bases):
    """The checkpoints in the VM that no later backup needs, once `new` is there.

    One that a disk outside of this backup builds on stays. QEMU cannot delete
    one on a backing image: to name it would only be complained about each time.
    """
    needed = {new.checkpoint}
    found = set()
    for disk, there in known.items():
        if disk in bases:
            found |= {each["checkpoint"] for each in there
                      if each["health"] not in ("missing", "foreign", "on_backing_image")}
        else:
            base = store.base_for(disk, there)
            needed |= {base.checkpoint} if base else set()
    return sorted(found - needed)


def commit(plugin, backup, delete, progress):
    """Tells the plugin that the backup is stored, once more where no reply came."""
    request = {"backup": backup}
    if delete:
        request["delete_checkpoints"] = delete
    try:
        try:
            answer = plugin.call("backup.commit", request, COMMIT_SECONDS)
        except TimeoutError:
            answer = plugin.call("backup.commit", request, COMMIT_SECONDS)
    except (PluginError, PluginGone, TimeoutError) as error:
        raise NotCommitted(
            "the backup is stored and can be restored, but its checkpoint may not be in the VM; "
            "the next backup finds out by itself: %s" % error) from error
    for leftover in answer.get("leftovers", []):
        progress.say("left behind: %s" % leftover)
