"""Is the store sound? Every stream, every chain, without a VM."""
from .store import StoreError
from .stream import Damage, read_stream


def run(store, say):
    """Checks all that is stored; `say` gets each problem. Returns (streams, problems)."""
    streams = problems = 0
    store.identity()
    for name in store.folders():
        try:
            backup = store.backup(name)
        except StoreError as error:
            say(str(error))
            problems += 1
            continue
        for disk in backup.disks:
            streams += 1
            for problem in problems_of(store, backup, disk):
                say(problem)
                problems += 1
    return streams, problems


def problems_of(store, backup, disk):
    """What is wrong with one disk of one backup: each a line with the file, stream and offset."""
    path = backup.stream_path(disk)
    index = 0
    try:
        links = store.chain(backup, disk)
        index = len(links) - 1
        yield from chain_problems(path, links, disk)
    except StoreError as error:
        yield "%s: %s" % (path, error)
    try:
        check_stream(path, backup, disk)
    except Damage as damage:
        damage.stream = index
        yield "%s: %s" % (path, damage)
    except OSError as error:
        yield "%s: stream %d, offset 0: %s" % (path, index, error)


def chain_problems(path, links, disk):
    """Does the backup fit the one that it builds on?"""
    if len(links) < 2:
        return
    base, entry = links[-2], links[-1].disks[disk]
    for what, value, wanted in (("disk's size", entry["size"], base.disks[disk]["size"]),
                                ("base", entry["base_checkpoint"], base.checkpoint)):
        if value != wanted:
            yield "%s: stream %d, offset 0: its %s is %s, and %s has %s" % (
                path, len(links) - 1, what, value, base.name, wanted)


def check_stream(path, backup, disk):
    """The file holds one whole stream, and it is the one that the manifest tells of."""
    entry = backup.disks[disk]
    end = {}
    with open(path, "rb", buffering=1 << 20) as file:
        for record, _ in read_stream(file):
            if record["kind"] == "begin":
                check_begin(record, backup, entry)
            end = record
        if file.read(1):
            raise Damage(entry["size"], "more follows the `end`")
    if end["digest"] != entry["digest"]:
        raise Damage(entry["size"], "its digest is %s, the manifest has %s"
                     % (end["digest"], entry["digest"]))


def check_begin(begin, backup, entry):
    """The stream is of the disk, size, mode, base and checkpoint that the manifest says."""
    expected = {name: entry[name] for name in ("disk", "size", "mode")}
    expected["checkpoint"] = backup.checkpoint
    expected["base"] = entry["base_checkpoint"]
    for name, value in expected.items():
        if begin.get(name) != value:
            raise Damage(0, "its %s is %s, the manifest has %s" % (name, begin.get(name), value))
