#!/usr/bin/env python3
"""A QMP proxy that has QEMU itself copy each point in time: the oracle of backup tests.

Clients talk with QEMU through it as if it were the monitor: every line passes unchanged,
and file descriptors with it. Only a `transaction` that begins a point in time (a
`blockdev-backup` with sync=none for each disk) gets one more action for each of its disks:
a full copy into a raw file. Both views belong to one instant, and neither is made from the
other, so what a backup program reads can be compared with these files byte for byte.

    proxy.py --listen NEW --monitor QMP --own-monitor QMP --folder FOLDER

Files of round N: FOLDER/N/DEVICE.raw, and FOLDER/N/done when they are complete and on disk:
the same line of JSON that standard output gets,

    {"round": N, "images": {"DEVICE": "PATH", ...}, "errors": {"DEVICE": "WHY", ...}}

A refused transaction leaves no files; its number is not used again.
"""

import argparse
import dataclasses
import itertools
import json
import os
import pathlib
import re
import shutil
import socket
import threading
import typing

try:
    from .qmp import Qmp, QmpError
except ImportError:  # run as a program
    from qmp import Qmp, QmpError


SETTLED = "transaction answered"  # not an event of QEMU's


@dataclasses.dataclass
class Copy:
    """One disk's copy."""

    device: str
    job: str
    node: str
    image: pathlib.Path
    error: str = ""


@dataclasses.dataclass
class Round:
    """The copies of one transaction. `accepted` is None until QEMU has answered."""

    number: int
    folder: pathlib.Path
    copies: list = dataclasses.field(default_factory=list)
    accepted: typing.Optional[bool] = None


class Proxy:
    """Serves one client after another until `close`, or until QEMU is gone."""

    def __init__(self, listen, monitor, own_monitor, folder, report=None):
        self.listen = listen
        self.monitor = monitor
        self.folder = pathlib.Path(folder).resolve()  # QEMU has a working directory of its own.
        self.folder.mkdir(parents=True, exist_ok=True)
        used = [int(entry.name) for entry in self.folder.iterdir() if entry.name.isdigit()]
        self._numbers = itertools.count(1 + max(used, default=0))
        self._report = report or (lambda result: None)
        self.on_command = lambda name: None  # called when a client's command is with QEMU
        self.copies_first = False  # a client hears of its transaction once the copies are complete
        self._rounds = {}  # under way, by number
        self._results = {}
        self._changed = threading.Condition()
        self._own = Qmp(own_monitor)
        self._drains_badly = self._own.command("query-version")["qemu"]["major"] < 8
        self._session = None
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(listen)
        self._listener.listen()
        self._follower = threading.Thread(target=self._follow, daemon=True)
        self._server = threading.Thread(target=self._serve, daemon=True)
        self._follower.start()
        self._server.start()

    def wait(self, number, timeout=120):
        """The result of a round, when its images are complete; None if it was refused."""
        with self._changed:
            if not self._changed.wait_for(lambda: number in self._results, timeout):
                raise TimeoutError(f"round {number} is not done after {timeout} s")
            return self._results[number]

    def join(self):
        """Returns when QEMU is gone."""
        self._follower.join()

    def close(self):
        # A plain close would not wake the thread that accepts.
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        while self._server.is_alive():
            if self._session:
                self._session.end()
            self._server.join(0.1)
        self._own.close()
        self._follower.join()
        os.unlink(self.listen)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    # --- for a session ---------------------------------------------------------------

    def begin(self, actions):
        """The transaction's actions with the copies among them, and their round."""
        backups = [
            index
            for index, action in enumerate(actions)
            if action.get("type") == "blockdev-backup" and action["data"].get("sync") == "none"
        ]
        if not backups:
            return actions, None
        number = next(self._numbers)
        round_ = Round(number, self.folder / str(number))
        self._rounds[number] = round_
        try:
            for device in dict.fromkeys(actions[index]["data"]["device"] for index in backups):
                self._prepare(round_, device)
        except (OSError, QmpError) as error:
            self._forget(round_)
            self._finish(round_, {"*": f"preparing failed: {error}"})
            return actions, None
        copies = [
            {
                "type": "blockdev-backup",
                "data": {
                    "job-id": copy.job,
                    "device": copy.device,
                    "target": copy.node,
                    "sync": "full",
                    "filter-node-name": f"{copy.node}-cbw",
                    "auto-dismiss": False,
                },
            }
            for copy in round_.copies
        ]
        # Each disk is drained from its own backup action on: still the same instant.
        after = backups[-1] + 1
        return actions[:after] + copies + actions[after:], round_

    def let_copies_end(self):
        """Comes before a transaction, which drains all disks: below QEMU 8.0, a job that ends meanwhile
        leaves the filter above its own, our client's, drained for ever, and the guest stands still."""
        with self._changed:
            if self._drains_badly and not self._changed.wait_for(lambda: not self._rounds, timeout=60):
                raise QmpError("the copies do not end")

    def settle(self, round_, accepted):
        """QEMU has answered the round's transaction."""
        round_.accepted = accepted
        self._own.events.put({"event": SETTLED})

    # --- within ----------------------------------------------------------------------

    def _serve(self):
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            try:
                self._session = Session(self, client)
            except OSError:
                client.close()  # QEMU is gone.
            else:
                self._session.run()

    def _prepare(self, round_, device):
        size = self._size(device)
        round_.folder.mkdir(exist_ok=True)
        # Names of nodes that QEMU has named itself begin with '#'.
        name = re.sub(r"[^A-Za-z0-9._-]", "_", device)
        copy = Copy(
            device=device,
            job=f"oracle-{round_.number}-{name}",
            node=f"oracle-{round_.number}-{len(round_.copies)}",
            image=round_.folder / f"{name}.raw",
        )
        with open(copy.image, "xb") as file:
            file.truncate(size)
        file = {"driver": "file", "filename": str(copy.image)}
        self._own.command("blockdev-add", {"driver": "raw", "node-name": copy.node, "file": file})
        round_.copies.append(copy)

    def _size(self, device):
        for node in self._own.command("query-named-block-nodes", {"flat": True}):
            if node.get("node-name") == device:
                return node["image"]["virtual-size"]
        for block in self._own.command("query-block"):
            if block["device"] == device and "inserted" in block:
                return block["inserted"]["image"]["virtual-size"]
        raise QmpError(f"no disk {device}")

    def _follow(self):
        """Looks at all rounds whenever a job or a transaction has come to its end."""
        while (event := self._own.events.get()) is not None:
            if event["event"] in ("JOB_STATUS_CHANGE", SETTLED):
                for round_ in list(self._rounds.values()):
                    try:
                        self._look(round_)
                    except QmpError as error:
                        self._finish(round_, {"*": str(error)})
        for round_ in list(self._rounds.values()):
            self._finish(round_, {"*": "QEMU is gone"})

    def _look(self, round_):
        if round_.accepted is None:
            return
        jobs = {job["id"]: job for job in self._own.command("query-jobs")}
        # A refused transaction leaves some of its jobs concluded and others unborn.
        ours = [jobs[copy.job] for copy in round_.copies if copy.job in jobs]
        if any(job["status"] != "concluded" for job in ours):
            return
        errors = {}
        for copy in round_.copies:
            if job := jobs.get(copy.job):
                self._own.command("job-dismiss", {"id": copy.job})
                if "error" in job:
                    errors[copy.device] = job["error"]
            elif round_.accepted:
                errors[copy.device] = "the job has vanished"
        self._forget(round_)
        self._finish(round_, errors)

    def _forget(self, round_):
        """Removes the targets, which also writes them to disk."""
        for copy in round_.copies:
            self._own.command("blockdev-del", {"node-name": copy.node})

    def _finish(self, round_, errors):
        if self._rounds.pop(round_.number, None) is None:
            return
        if round_.accepted is False:
            shutil.rmtree(round_.folder)
            self._publish(round_, None)
            return
        images = {copy.device: str(copy.image) for copy in round_.copies}
        result = {"round": round_.number, "images": images, "errors": errors}
        round_.folder.mkdir(exist_ok=True)
        written = round_.folder / "done.new"
        written.write_text(json.dumps(result) + "\n")
        written.rename(round_.folder / "done")
        self._publish(round_, result)
        self._report(result)

    def _publish(self, round_, result):
        with self._changed:
            self._results[round_.number] = result
            self._changed.notify_all()


class Session:
    """One client, with a connection to the monitor of its own, as if it were connected."""

    def __init__(self, proxy, client):
        self.proxy = proxy
        self.client = client
        self.qemu = socket.socket(socket.AF_UNIX)
        self._open = {}  # transactions without an answer: (id, whether we gave it), round
        self._answered = threading.Condition()
        self.qemu.connect(proxy.monitor)

    def run(self):
        replies = threading.Thread(target=self._from_qemu, daemon=True)
        replies.start()
        self._from_client()
        # The client may leave without hearing how its transaction went; we may not.
        with self._answered:
            self._answered.wait_for(lambda: not self._open, timeout=60)
        self.end()
        replies.join()
        self.qemu.close()
        self.client.close()

    def end(self):
        for end in (self.qemu, self.client):
            try:
                end.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass  # The other side was first.

    def _from_client(self):
        rest, fds = b"", []
        try:
            while True:
                data, new, _, _ = socket.recv_fds(self.client, 65536, 16, socket.MSG_CMSG_CLOEXEC)
                fds += new
                if not data:
                    break
                *lines, rest = (rest + data).split(b"\n")
                for line in lines:
                    self._to_qemu(line + b"\n", fds)
            self.qemu.sendall(rest)
        except (OSError, QmpError):
            pass  # The client or QEMU is gone.
        for fd in fds:
            os.close(fd)

    def _to_qemu(self, line, fds):
        try:
            command = json.loads(line)
            name = command.get("execute")
        except (ValueError, AttributeError):
            command, name = None, None  # QEMU's to complain about.
        if name == "transaction":
            line = self._transaction(command) or line
        # A stream may deliver an fd together with lines before its own; it belongs to the
        # first line that takes one.
        along = fds[:1] if name in ("getfd", "add-fd") else []
        sent = socket.send_fds(self.qemu, [line], along)
        self.qemu.sendall(line[sent:])
        for fd in along:
            os.close(fd)
            fds.remove(fd)
        self.proxy.on_command(name)

    def _transaction(self, command):
        """The line to send instead, or None."""
        try:
            self.proxy.let_copies_end()
            actions, round_ = self.proxy.begin(command["arguments"]["actions"])
        except (KeyError, TypeError, AttributeError):
            return None  # Not well-formed: QEMU's to refuse.
        if round_ is None:
            return None
        command["arguments"]["actions"] = actions
        # An answer is known by its id.
        given = "id" in command
        key = command.setdefault("id", f"oracle-{round_.number}")
        with self._answered:
            self._open[json.dumps(key)] = (round_, given)
        return json.dumps(command).encode() + b"\n"

    def _from_qemu(self):
        try:
            with self.qemu.makefile("rb") as lines:
                for line in lines:
                    if self._open:
                        line = self._look(line)
                    try:
                        self.client.sendall(line)
                    except OSError:
                        pass  # Gone; but an answer may be still to come.
        except OSError:
            pass
        with self._answered:
            for round_, _ in self._open.values():
                self.proxy.settle(round_, False)
            self._open.clear()
            self._answered.notify_all()
        self.end()

    def _look(self, line):
        message = json.loads(line)
        found = self._open.get(json.dumps(message.get("id")))
        if "event" in message or found is None:
            return line
        round_, given = found
        self.proxy.settle(round_, "return" in message)
        if self.proxy.copies_first:
            self.proxy.wait(round_.number)
        with self._answered:
            del self._open[json.dumps(message["id"])]
            self._answered.notify_all()
        if given:
            return line
        del message["id"]
        return json.dumps(message).encode() + b"\r\n"


def main():
    parser = argparse.ArgumentParser(description="Relay QMP and copy every point in time.")
    parser.add_argument("--listen", required=True, help="unix socket to make, for clients")
    parser.add_argument("--monitor", required=True, help="QEMU's monitor to relay to")
    parser.add_argument("--own-monitor", required=True, help="another one, for the proxy itself")
    parser.add_argument("--folder", required=True, help="for the images")
    options = parser.parse_args()
    paths = options.listen, options.monitor, options.own_monitor, options.folder
    with Proxy(*paths, report=lambda result: print(json.dumps(result), flush=True)) as proxy:
        proxy.join()


if __name__ == "__main__":
    main()
