"""How many experts fit where: memory of devices, or of workers that others start, in experts. Pure."""

from __future__ import annotations

from collections.abc import Mapping

from cluster.control.plan import Seen
from cluster.control.topology import LOAD_SHARE, MEMORY_SHARE
from cluster.control.view import View
from cluster.store.records import WorkerRecord

SPARE_EXPERTS = 1  # that a full device may hold beside what fits, so that full workers can exchange, if they take it

Place = tuple[str, str]


class Room:
    def __init__(self, view: View) -> None:
        self._view = view
        self._seen = view.seen
        self._expert_bytes = view.terms.demand.expert_bytes

    def place_of(self, record: WorkerRecord) -> Place:
        """What shares one memory: a device, or where others start workers, each worker."""
        return (record.node_id, record.device_id) if self._seen.starts_workers else ("", record.name)

    def slots(self, members: Mapping[str, Seen]) -> dict[str, int]:
        """Experts that fit on each; more than its share where the live ones must take those of lost ones."""
        slots = {worker_id: worker.record.memory_bytes // self._expert_bytes for worker_id, worker in members.items()}
        missing = len(self._view.all_experts) - sum(slots.values())
        room = {place: self._capacity(place) for place in {self.place_of(w.record) for w in members.values()}}
        for worker_id, worker in members.items():
            room[self.place_of(worker.record)] -= slots[worker_id]
        for worker_id, worker in sorted(members.items(), key=lambda item: -room[self.place_of(item[1].record)]):
            more = max(0, min(missing, room[self.place_of(worker.record)]))
            slots[worker_id] += more
            room[self.place_of(worker.record)] -= more
            missing -= more
        return slots

    def left(self) -> dict[Place, int]:
        """Experts that more could be loaded, by what shares one memory."""
        room: dict[Place, int] = {}
        for worker in self._seen.workers.values():
            if worker.record.role == "expert" and worker.is_running:
                place = self.place_of(worker.record)
                room.setdefault(place, self._capacity(place))
                if worker.report is not None:
                    worker_id = worker.record.worker_id
                    promised = self._view.promised(worker_id) if worker_id in self._view.experts else frozenset()
                    room[place] -= len(self._view.terms.from_layers(worker.report.experts) | promised)
        return room

    def takes_spare(self, worker_id: str) -> bool:
        """Whether the worker itself takes more than fits: it counts all that it holds and loads."""
        view = self._view
        memory_bytes = self._memory_bytes(self.place_of(view.experts[worker_id].record))
        most_bytes = int(memory_bytes / MEMORY_SHARE) * LOAD_SHARE
        num_experts = len(view.held[worker_id] | view.promised(worker_id)) + SPARE_EXPERTS
        return num_experts * self._expert_bytes <= int(most_bytes)

    def _capacity(self, place: Place) -> int:
        """Experts that fit there beside the attention workers."""
        memory_bytes = self._memory_bytes(place)
        if self._seen.starts_workers:
            attention = [w for w in self._view.placed.values() if w.role == "attention" and w.place == place]
            memory_bytes -= sum(w.memory_bytes for w in attention)
        return max(0, memory_bytes) // self._expert_bytes

    def _memory_bytes(self, place: Place) -> int:
        if not self._seen.starts_workers:
            return self._seen.workers[place[1]].record.memory_bytes
        devices = ((node.id, device) for node in self._seen.topology.nodes for device in node.devices)
        return sum(device.memory_bytes for node_id, device in devices if (node_id, device.id) == place)
