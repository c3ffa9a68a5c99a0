"""Where torchrun's agents and the ranks meet: torch's static rendezvous behind a socket that the node has opened.

torch itself would listen on every interface of the head node; the socket listens at the one address that the others
are told, on this machine alone where it is 127.0.0.1. torchrun finds this by the entry point `torchrun.handlers` and
the name that `launcher.node` gives it. Nothing here, nor in what it builds on, unpickles what a peer says.
"""

from __future__ import annotations

from collections.abc import Callable

from torch._C._distributed_c10d import TCPStore
from torch.distributed.elastic.rendezvous import RendezvousInfo, RendezvousParameters
from torch.distributed.elastic.rendezvous.static_tcp_rendezvous import StaticTCPRendezvous
from torch.distributed.elastic.rendezvous.utils import parse_rendezvous_endpoint


class Meeting(StaticTCPRendezvous):
    listening: int | None = None
    """The head node's socket."""

    def get_backend(self) -> str:
        return "speechctl"

    def next_rendezvous(self) -> RendezvousInfo:
        if self.listening is not None and self._store is None:
            self._store = TCPStore(
                self.master_addr,
                self.master_port,
                self.world_size,
                is_master=True,
                timeout=self.timeout,
                multi_tenant=True,
                master_listen_fd=self.listening,
            )
        return super().next_rendezvous()


def create(given: RendezvousParameters) -> Meeting:
    address, port = parse_rendezvous_endpoint(given.endpoint, -1)
    rank, timeout = int(given.config["rank"]), int(given.config["timeout"])
    made = Meeting(address, port, rank, given.max_nodes, given.run_id, timeout)
    if rank == 0:
        made.listening = int(given.config["listening"])
    return made


def handler() -> Callable[[RendezvousParameters], Meeting]:
    return create
