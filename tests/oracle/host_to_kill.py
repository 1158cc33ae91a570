"""A host that begins to read a backup, or exports its disks, and then hangs, for a test to kill.

Its arguments: the plugin's command and backup.begin's parameters, as JSON, and `export` for
an export. It prints the plugin's process id once it has had the first data of each disk;
of an export then each disk's reply, one a line.
"""

import json
import signal
import sys

from .support import Wire


def main():
    wire = Wire(json.loads(sys.argv[1]))
    began = wire.call("backup.begin", json.loads(sys.argv[2]))
    take = export if sys.argv[3:] == ["export"] else read
    replies = take(wire, began)
    print(wire.process.pid, *map(json.dumps, replies), sep="\n", flush=True)
    signal.pause()


def read(wire, began):
    waiting = {}
    for disk in began["disks"]:
        stream = wire.send("backup.read", {"backup": began["backup"], "disk": disk["disk"]})
        waiting[stream] = disk["disk"]
    while waiting:
        message, _ = wire.receive()
        if message.get("method") == "record" and message["params"]["record"]["kind"] == "data":
            waiting.pop(message["params"]["stream"], None)
    return []


def export(wire, began):
    params = [{"backup": began["backup"], "disk": disk["disk"]} for disk in began["disks"]]
    return [wire.call("backup.export", each) for each in params]


if __name__ == "__main__":
    main()
