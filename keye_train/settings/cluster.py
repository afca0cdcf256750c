"""The machines that a run is forecast for (``keye-train plan``); training itself reads none of this."""

from __future__ import annotations

from dataclasses import dataclass, field

from keye_train.settings.basics import SettingsError
from keye_train.settings.training import TrainSettings

MAY_BE_0 = ("reserved_gb", "overlap")


@dataclass
class ClusterSettings:
    """Nodes of equal devices. GB are 10^9 bytes; rates are per second and in one direction."""

    name: str = "laptop"
    nodes: int = 1
    ranks_per_node: int = 1
    """Processes of a node, one for each device."""
    device_memory_gb: float = 8.0
    """Of one device; of a CPU, what one rank may take."""
    reserved_gb: float = 0.5
    """Of the device's memory: its context, libraries, and what the allocator loses to fragmentation."""
    peak_tflops: float = 0.1
    """Of one device, dense products in the precision of the run."""
    efficiency: float = 0.5
    """Share of the peak that forward and backward reach while they compute."""
    memory_gb_per_s: float = 20.0
    """Of the device's own memory: bounds the optimizer."""
    node_gb_per_s: float = 5.0
    """From one device to the others of its node."""
    network_gb_per_s: float = 1.0
    """From one device to other nodes, by a port of its own: a ring over nodes has all ports of a node."""
    overlap: float = 0.8
    """Share of the communication that runs beside computation where ``deepspeed.overlap_comm`` is on."""
    host_memory_gb: float = 16.0
    """Of one node."""
    host_memory_gb_per_s: float = 20.0
    """Of the host memory of one node: bounds an optimizer that lives there."""
    host_link_gb_per_s: float = 10.0
    """Between one device and its host."""
    storage_gb_per_s: float = 0.4
    """Writing checkpoints, all nodes together."""

    @property
    def ranks(self) -> int:
        """Processes of the whole run."""
        return self.nodes * self.ranks_per_node


@dataclass
class ForecastSettings(TrainSettings):
    """A run of ``keye-train`` and the machines it would have."""

    cluster: ClusterSettings = field(default_factory=ClusterSettings)

    def check(self) -> None:
        """Raise SettingsError for values that cannot work together."""
        super().check()
        for name, value in vars(self.cluster).items():
            if isinstance(value, str) or value > 0 or (value == 0 and name in MAY_BE_0):
                continue
            raise SettingsError(
                f"cluster.{name}={value} must " + ("not be negative" if name in MAY_BE_0 else "be above 0")
            )
        if self.cluster.efficiency > 1 or self.cluster.overlap > 1:
            raise SettingsError("cluster.efficiency and cluster.overlap are shares: at most 1")
        try:
            self.gradient_accumulation(self.cluster.ranks)
        except SettingsError as error:
            ranks = f"cluster.nodes={self.cluster.nodes} x cluster.ranks_per_node={self.cluster.ranks_per_node}"
            raise SettingsError(f"{error} ({ranks} of cluster={self.cluster.name})") from None
