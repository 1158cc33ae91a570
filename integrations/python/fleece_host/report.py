"""What the operator sees: progress, tables, messages."""
import sys
import time

PLAIN_SECONDS = 10
BAR = 24


class Progress:
    """A bar on a terminal; elsewhere a plain line now and then."""

    def __init__(self, out=None):
        self._out = out or sys.stderr
        self._bar = self._out.isatty()
        self._sinks = []
        self._shown = False
        self._last = self._started = time.monotonic()

    def start(self, sinks):
        self._sinks = list(sinks)
        self._last = self._started = time.monotonic()

    def paint(self):
        """Shows how far all streams are together."""
        now = time.monotonic()
        if not self._bar and now - self._last < PLAIN_SECONDS:
            return
        self._last = now
        total = sum(sink.planned["size"] for sink in self._sinks)
        done = sum(sink.checker.offset for sink in self._sinks)
        data = sum(sink.checker.data_bytes for sink in self._sinks)
        share = done / total if total else 1.0
        speed = data / max(now - self._started, 0.001)
        text = "%3d %%  %s of %s, data %s, %s/s" % (
            int(share * 100), size(done), size(total), size(data), size(speed))
        if self._bar:
            filled = int(share * BAR)
            text = "\r[%s%s] %s\033[K" % ("#" * filled, "." * (BAR - filled), text)
        self._write(text, "" if self._bar else "\n")
        self._shown = True

    def finish(self):
        """The streams are whole."""
        if self._bar:
            self.paint()
        self.clear()

    def clear(self):
        """Leaves the line of the bar."""
        if self._bar and self._shown:
            self._write("", "\n")
        self._shown = False

    def say(self, text):
        """A line of its own."""
        self.clear()
        self._write(text, "\n")

    def notice(self, method, params):
        """A notification: what happened to the VM is worth a line, others are not."""
        if method == "vm" and isinstance(params, dict):
            detail = params.get("detail")
            self.say("the VM: %s%s" % (params.get("event"), " (%s)" % detail if detail else ""))

    def _write(self, text, end):
        self._out.write(text + end)
        self._out.flush()


def size(count):
    """Bytes for people."""
    if count < 1024:
        return "%d B" % count
    for unit in ("KiB", "MiB", "GiB", "TiB"):
        count /= 1024
        if count < 1024 or unit == "TiB":
            return "%.1f %s" % (count, unit)


def table(head, rows):
    """Columns as wide as they need; the first to the left, numbers to the right."""
    rows = [[str(cell) for cell in row] for row in [head] + rows]
    widths = [max(map(len, column)) for column in zip(*rows)]
    right = [i > 0 and all(row[i][:1].isdigit() for row in rows[1:]) for i in range(len(head))]
    return "\n".join(
        "  ".join(cell.rjust(width) if is_right else cell.ljust(width)
                  for cell, width, is_right in zip(row, widths, right)).rstrip()
        for row in rows)


def consistency_line(reached):
    """What the point in time is consistent with, and what that has cost the guest."""
    kind = reached["kind"]
    if kind == "agent":
        return "consistent: %d file systems were frozen, for %d ms" % (
            reached["filesystems"], reached["frozen_ms"])
    if kind == "pause":
        return "consistent as after a loss of power; the VM was paused for %d ms" % (
            reached["paused_ms"])
    why = " (%s)" % reached["reason"] if reached.get("reason") else ""
    return "consistent as after a loss of power" + why


def backup_table(manifest):
    """A backup's disks, one a line."""
    return table(
        ["disk", "mode", "why full", "data", "zero", "same", "stored", "seconds"],
        [[each["disk"], each["mode"], why_full(each),
          size(each["data_bytes"]), size(each["zero_bytes"]), size(each["same_bytes"]),
          size(each["stored_bytes"]), "%.1f" % each["seconds"]]
         for each in manifest["disks"]])


def why_full(entry):
    """The plugin's reason; `no base` where it was to be full."""
    if entry["mode"] == "incremental":
        return "-"
    return entry.get("reason") or (
        "no base" if entry.get("planned") == "full" else "not said")


def checkpoint_table(disks):
    """What the VM remembers, a checkpoint of a disk a line."""
    rows = []
    for disk in disks:
        for each in disk["checkpoints"]:
            when = "-" if each.get("time_ms") is None else local_time(each["time_ms"])
            rows.append([disk["disk"], each["checkpoint"], each.get("chain") or "-", each["health"],
                         when, _size_or_dash(each.get("dirty_bytes")),
                         _size_or_dash(each.get("memory_bytes"))])
    return table(["disk", "checkpoint", "chain", "health", "time", "changed", "memory"], rows)


def estimate_table(disks):
    """What the next backup would be, a disk a line."""
    return table(
        ["disk", "size", "mode", "why full", "reads", "at most"],
        [[each["disk"], size(each["size"]), each["mode"], why_full(each),
          size(each["read_bytes"]), size(each["changed_bytes"])]
         for each in disks])


def repair_lines(answer):
    """What was repaired and what is left, for each disk; then what is still open."""
    if not any(disk["removed"] or disk["leftovers"] for disk in answer["disks"]):
        yield "nothing had to be removed"
    for disk in answer["disks"]:
        for what in ("removed", "leftovers", "foreign"):
            for name in disk[what]:
                yield "%s: %s: %s" % (disk["disk"], REPAIRED[what], name)
        for each in disk["usable"]:
            yield "%s: still a base: %s (%s)" % (disk["disk"], each["checkpoint"], each["chain"])
        for each in disk["lost"]:
            yield "%s: lost, a backup from it is full: %s (%s)" % (
                disk["disk"], each["checkpoint"], each["health"])
    for backup in answer["open_backups"]:
        yield "a backup is open in QEMU (its plugin runs, or was killed): %s" % backup


REPAIRED = {"removed": "removed", "leftovers": "could not be removed",
            "foreign": "somebody else's, untouched"}


def _size_or_dash(count):
    return "-" if count is None else size(count)


def local_time(time_ms):
    """A time for people."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(time_ms / 1000))


def store_table(backups):
    """A store's backups, a disk a line."""
    rows = []
    for backup in backups:
        when = local_time(backup.manifest["time_ms"])
        for each in backup.manifest["disks"]:
            rows.append([backup.name, when, each["disk"], each["mode"], size(each["size"]),
                         size(each["stored_bytes"]), each["base"] or "-"])
    return table(["backup", "time", "disk", "mode", "size", "stored", "base"], rows)
