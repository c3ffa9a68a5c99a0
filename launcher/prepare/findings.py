"""What a recipe needs of its hosts, and what was found on them: values, which `judge` reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from launcher.backends.ssh import Trouble
from launcher.errors import SpeechctlError
from launcher.hosts import Host
from launcher.node import WORKER


@dataclass(frozen=True)
class Needs:
    """What the recipe needs."""

    backend: str
    machines: tuple[Host, ...]
    run: str
    """The run's directory. All paths are absolute."""
    interpreter: str
    pythonpath: str
    packs: tuple[str, ...]
    source: str | None
    """Of the backbone: a directory or a hub id. Of a bundle of torchaudio's, where it lies once it was converted."""
    revision: str | None
    hub: str | None
    """Hugging Face's cache, where the launcher's environment says where it is."""
    builds: str
    """Where torch builds extensions."""
    device: str
    keep_checkpoints: int
    token: str
    """A name that no file has yet."""
    holder: dict[str, Any] | None = None
    """Who says to hold the run's lock."""
    interface_names: tuple[tuple[str, str], ...] = ()
    """NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME, as far as the user has set them."""
    variables: dict[str, str] = field(default_factory=dict)
    """What ranks have in their environment, but for the secrets."""
    bundle: str | None = None
    """The name under which `backbone.source` has that bundle."""
    secrets: tuple[str, ...] = ()
    """Variables whose values go to no host."""
    stop_grace_s: float = 3.0
    """How long ranks may take to seal."""

    def for_host(self, rank: int) -> dict[str, Any]:
        """What the probe there is told. The head meets all, the others the head and the next in a ring."""
        count = len(self.machines)
        peers = range(count) if rank == 0 else sorted({0, (rank + 1) % count})
        return {
            "run": self.run,
            "interpreter": self.interpreter,
            "pythonpath": self.pythonpath,
            "packs": list(self.packs),
            "source": self.source,
            "revision": self.revision,
            "hub": self.hub,
            "builds": self.builds,
            "modules": ["launcher.node", WORKER, "torch.distributed.run"],
            "token": self.token,
            "holder": self.holder,
            "head": self.machines[0].name,
            "head_address": self.machines[0].address,
            "peers": [{"name": self.machines[k].name, "address": self.machines[k].address} for k in peers],
        }


@dataclass
class Seen:
    """What was found on one host."""

    host: Host
    trouble: Trouble | None = None
    """Why it was not reached."""
    words: str = ""
    """What was said about that."""
    reached_s: float = 0.0
    python: str = ""
    """Of the probe: whatever `python3` is there."""
    facts: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By name `{"value": …}` or `{"error": …}`, as the probe answered."""
    clock: tuple[float, float] | None = None
    """How far its clock is ahead of ours and the round trip, in seconds."""
    shared: str | None = None
    """Why it did not read the token that the head wrote; empty: it did. None: nobody tried."""
    dialled: list[dict[str, Any]] = field(default_factory=list)
    """Which hosts it called, at which port, and what came of it."""

    @property
    def name(self) -> str:
        return self.host.name

    def value(self, fact: str) -> Any:
        """What the probe answered, or None where it did not."""
        return self.facts.get(fact, {}).get("value")


@dataclass
class AllReduce:
    """What came of a sum over one rank on each host."""

    not_tried: str | None = None
    """Why there was none."""
    problems: dict[str, str] = field(default_factory=dict)
    """By host."""
    seconds: float = 0.0
    """Of one sum."""
    meeting_s: float = 0.0
    bytes: int = 0
    backend: str = "gloo"


@dataclass
class Findings:
    needs: Needs
    seen: Sequence[Seen]
    here: Seen | None = None
    """The environment of this machine, where it is not itself one of the hosts."""
    shared_here: str | None = None
    """As `Seen.shared`, for this machine."""
    state_bytes_per_rank: int | None = None
    checkpoint_bytes: int | None = None
    sizes_unknown: str | None = None
    """Why they are None."""
    all_reduce: AllReduce | None = None
    refused: list[SpeechctlError] = field(default_factory=list)
    """For what a launch from this machine would be refused, whatever the hosts are like."""

    @property
    def reached(self) -> list[Seen]:
        return [s for s in self.seen if s.trouble is None]
