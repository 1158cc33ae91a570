"""A host that begins to read a backup and then hangs, for a test to kill.

Its arguments: the plugin's command and backup.begin's parameters, as JSON. It prints the
plugin's process id once it has had the first data of each disk.
"""

import json
import signal
import sys

from .support import Wire


def main():
    wire = Wire(json.loads(sys.argv[1]))
    began = wire.call("backup.begin", json.loads(sys.argv[2]))
    waiting = {}
    for disk in began["disks"]:
        stream = wire.send("backup.read", {"backup": began["backup"], "disk": disk["disk"]})
        waiting[stream] = disk["disk"]
    while waiting:
        message, _ = wire.receive()
        if message.get("method") == "record" and message["params"]["record"]["kind"] == "data":
            waiting.pop(message["params"]["stream"], None)
    print(wire.process.pid, flush=True)
    signal.pause()


if __name__ == "__main__":
    main()
