"""Where a process of an attention group listens, and what it says of itself to the others. Knows no Ray."""

from contextlib import ExitStack

from cluster.worker import Formation, Location, StageAddress, WorkerConfig, url_host
from llama4_dist.checkpoint.reader import Checkpoint
from llama4_dist.dispatch.links.link import dtype_name
from llama4_dist.dispatch.links.listener import Listener
from llama4_dist.engine.build import resolve_dtype
from llama4_dist.engine.devices import arithmetic
from llama4_dist.errors import PreconditionError
from llama4_dist.stages.collective import LOOPBACK
from llama4_dist.stages.links.dial import Target
from llama4_dist.stages.links.door import Door
from llama4_dist.stages.links.hello import GroupIdentity
from llama4_dist.stages.links.member import Neighbours


class StageDoor:
    """A Unix socket for this node, TCP for the others, and the number of the formation that is due."""

    def __init__(self, config: WorkerConfig, location: Location, incarnation: int) -> None:
        self.number = 0  # the highest this process was told of
        self._config = config
        self._location = location
        with ExitStack() as resources:
            # Short, for the path of a Unix socket has 107 bytes.
            name = f"{config.group}.{config.stage}.{config.rank}" if config.group else config.worker
            path = config.run_dir / f"{name}-{incarnation}.sock"
            self._unix = Listener(f"unix:{path}", secret=config.secret)
            resources.callback(self._unix.close)
            self._tcp = Listener(f"tcp:{url_host(location.address)}:0", secret=config.secret)
            resources.callback(self._tcp.close)
            self.door = Door([self._unix, self._tcp], secret=config.secret)
            resources.pop_all()

    @property
    def addresses(self) -> tuple[str, ...]:
        """Where it listens."""
        return self._unix.address, self._tcp.address

    def next(self, number: int) -> None:
        """Take the number of the next formation; PreconditionError (STALE_FORMATION) for one that is not newer."""
        if number <= self.number:
            raise PreconditionError(
                f"formation {number} is not newer than {self.number}, which is known here", reason="STALE_FORMATION"
            )
        self.number = number

    def check(self, formation: Formation) -> None:
        """Raise PreconditionError (STALE_FORMATION) for a formation that this process was not prepared for."""
        if formation.number != self.number:
            raise PreconditionError(
                f"formation {formation.number} came, and {self.number} is due", reason="STALE_FORMATION"
            )

    def address(self, num_pages: int) -> StageAddress:
        """Say where the others reach this process."""
        return StageAddress(
            worker=self._config.worker,
            node=self._location.node,
            address=self._location.address,
            unix=self._unix.address,
            tcp=self._tcp.address,
            num_pages=num_pages,
        )

    def target(self, one: StageAddress, stage: int, rank: int) -> Target:
        """Return where to dial a place of the group from here."""
        return one.seen_from(self._location.node), stage, rank

    def neighbours(self, formation: Formation) -> Neighbours:
        """Return whom a member dials, and where its ranks gather: on the loopback where all of them share a node."""
        config, num_ranks = self._config, self._config.partition.num_ranks
        stage, rank = config.stage, config.rank
        own = formation.members[stage * num_ranks : (stage + 1) * num_ranks]
        if stage == config.partition.num_stages - 1:
            after = self.target(formation.leader, config.partition.num_stages, 0)
        else:
            after = self.target(formation.members[(stage + 1) * num_ranks + rank], stage + 1, rank)
        on_one_node = len({one.node for one in own}) == 1
        return Neighbours(
            after=after,
            ranks=tuple(self.target(own[before], stage, before) for before in range(rank)),
            address=LOOPBACK if on_one_node else self._location.address,
        )

    def identity(self, checkpoint: Checkpoint, formation: Formation) -> GroupIdentity:
        """Return what all processes of a formation have alike."""
        config, partition = self._config, self._config.partition
        dtype = resolve_dtype(config.dtype, checkpoint.config.dtype)
        return GroupIdentity(
            group=formation.group,
            formation=formation.number,
            model_hash=checkpoint.model_hash,
            num_stages=partition.num_stages,
            num_ranks=partition.num_ranks,
            num_pages=formation.num_pages,
            block_size=config.options.block_size,
            dtype=dtype_name(dtype),
            weights=config.weights,
            arithmetic=arithmetic(dtype, config.device, config.weights),
        )

    def close(self) -> None:
        """Listen no more; the socket file goes too."""
        self.door.close()
