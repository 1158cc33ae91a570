"""What the VM remembers: the checkpoints of a store, or of everybody."""


def of_disks(plugin, monitor, chain):
    """{disk: its checkpoints in this chain}."""
    answer = plugin.call("checkpoint.list", {"monitor": monitor, "chain": chain})
    return {disk["disk"]: disk["checkpoints"] for disk in answer["disks"]}


def listed(plugin, monitor, chain):
    """The disks with their checkpoints; of every chain where `chain` is None."""
    return plugin.call("checkpoint.list", _scope(monitor, chain))["disks"]


def repaired(plugin, monitor, chain):
    """Removes what a crash has left useless; the plugin's report."""
    return plugin.call("checkpoint.repair", _scope(monitor, chain))


def _scope(monitor, chain):
    return dict({"monitor": monitor}, **({"chain": chain} if chain else {"all_chains": True}))
