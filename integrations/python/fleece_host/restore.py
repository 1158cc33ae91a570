"""Store -> disk image: the records of a chain, fed to the plugin in order."""
import collections
import os

from .plugin import PluginError
from .stream import Chain, Damage, read_stream

# Bounds what waits in memory and in the pipe; the plugin takes them in order anyhow.
MOST_UNDER_WAY = 16


class RestoreFailed(Exception):
    """There is no image."""


def run(plugin, store, disk, at, target, image_format):
    """Makes the image `target` of the disk; returns restore.finish's answer."""
    backup = store.find(at, disk)
    links = store.chain(backup, disk)
    size = backup.disks[disk]["size"]
    restore = plugin.call("restore.begin", {
        "target": os.path.abspath(target), "format": image_format, "size": size})["restore"]
    try:
        feed(plugin, restore, links, disk)
        answer = plugin.call("restore.finish", {"restore": restore})
    except PluginError as error:
        stream = error.data.get("stream")
        if error.code == "stream_damaged" and type(stream) is int and stream < len(links):
            raise RestoreFailed("%s: %s" % (links[stream].stream_path(disk), error)) from error
        raise
    if answer.get("checkpoint") != backup.checkpoint or answer.get("size") != size:
        raise RestoreFailed("the image is of checkpoint %s with %s bytes, not what was asked for"
                            % (answer.get("checkpoint"), answer.get("size")))
    return answer


def feed(plugin, restore, links, disk):
    """All records of the chain, each checked before it goes."""
    chain, under_way = Chain(), collections.deque()
    for index, link in enumerate(links):
        try:
            with open(link.stream_path(disk), "rb", buffering=1 << 20) as file:
                for record, payload in read_stream(file):
                    if record["kind"] == "begin":
                        chain.follow(record)
                    under_way.append(plugin.start(
                        "restore.write", {"restore": restore, "record": record}, payload))
                    while len(under_way) > MOST_UNDER_WAY or (
                            under_way and under_way[0].done()):
                        under_way.popleft().result()
                if file.read(1):
                    raise Damage(0, "more follows the `end`", index + 1)
        except Damage as damage:
            damage.stream = index
            raise RestoreFailed("%s: %s" % (link.stream_path(disk), damage)) from damage
    while under_way:
        under_way.popleft().result()
