"""Whether a cluster that is being started has come up, or never will, by what its controller says in the store."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from cluster.config import Settings
from cluster.control.worker_folders import logs_folder
from cluster.errors import ConfigError, PlacementError, by_code
from cluster.protocol import Lead
from cluster.store.records import ClusterStatus

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sight:
    """What stands in the store at one moment, and which controller of ours has led last (None: none yet)."""

    status: ClusterStatus | None
    lead: Lead | None
    ours: str | None = None


class ComingUp:
    """Judges what is seen, from before the controller was started. `before`: the status that stood there then."""

    def __init__(self, settings: Settings, before: ClusterStatus | None) -> None:
        self.problem: str | None = None  # the last that was told of
        self._settings = settings
        self._before = before
        self._told_of: set[str] = set()

    def is_serving(self, sight: Sight) -> bool:
        """Whether every worker serves, as the controller says that leads now.

        A status that stood there before is an earlier cluster's, and one of a controller that does not lead any more
        says what was. Another controller may lead for this one, where both are of one cluster. Raises `ConfigError`
        where it leads another model's, and the error of what cannot come up by being tried again.
        """
        status = sight.status
        if status is None or sight.lead is None or status.controller_id != sight.lead.controller_id:
            return False
        before = self._before
        if before is not None and (before.controller_id, before.at_s) == (status.controller_id, status.at_s):
            return False
        if status.controller_id != sight.ours:
            self._check_other(status)
        self._check_failures(status)
        if status.problem is not None:
            self.problem = status.problem
            self._tell(f"not serving yet: {status.problem}")
        return (
            status.problem is None
            and bool(status.workers)
            and all(worker.condition == "serving" for worker in status.workers)
        )

    def _check_other(self, status: ClusterStatus) -> None:
        name, model = self._settings.cluster_name, self._settings.served_model_name
        if status.model != model:
            raise ConfigError(
                f"controller {status.controller_id}, which something else started, leads the cluster {name} of this "
                f"store and serves {status.model}, not {model}: choose another --cluster-name, or end that one",
                param="cluster_name",
            )
        self._tell(f"controller {status.controller_id}, which something else started, leads {name}; ours stands by")

    def _check_failures(self, status: ClusterStatus) -> None:
        num_nodes = sum(node.is_alive for node in status.nodes)
        for failure in status.failures:
            if failure.worker:
                raise by_code(failure.code)(
                    f"the cluster does not come up: {failure.worker} does not start: {failure.message} "
                    f"(its log is in {logs_folder(self._settings)})"
                )
            # Nodes of another's Ray may be yet to come; ours are all there before the controller is.
            if self._settings.local is not None and num_nodes >= self._settings.local:
                raise PlacementError(f"the cluster does not come up: {failure.message}")

    def _tell(self, what: str) -> None:
        if what not in self._told_of:
            self._told_of.add(what)
            logger.info("%s", what)
